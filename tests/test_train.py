"""The training program as a user runs it, at tiny size.

Schedule, stages, resuming to the bit, evaluation to the last digit, mistakes.
"""

import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import fails, read_json, read_log, run, succeeds, tiny_arguments
from PIL import Image

import evaluate
import options
import runtime
import train
from runtime import load_checkpoint

SHORT = ["--epochs", 1, 0, "--epoch-steps", 1]


def test_schedule_by_hand():
    factors = [train.lr_factor(step, 100, 10) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1
    assert factors[40] == pytest.approx(0.5)
    assert factors[89] == pytest.approx((10 / 89) ** 0.5)
    reached = (10 / 90) ** 0.5
    assert factors[90:] == pytest.approx([reached * left / 10 for left in range(10, 0, -1)])
    assert all(0 < factor <= 1 for factor in factors)
    short = [train.lr_factor(step, 4, 100) for step in range(4)]
    assert short == pytest.approx([0.01, 0.02, 0.03, 0.04])
    assert train.lr_factor(0, 10, 0) == 1


def test_cosine_by_hand():
    factors = [train.cosine_factor(step, 30, 10) for step in range(30)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1
    assert factors[20] == pytest.approx(0.5)
    assert 0 < factors[29] < 0.01


def test_the_time_left_is_that_of_both_stages():
    """Stage 1 has 40 steps of 6 seconds; stage 2 has 80, and each takes three times as long."""
    args = options.parse(["--epochs", "2", "5", "--epoch-steps", "20", "16"])

    def left(stage: int, done: int) -> str:
        batches = SimpleNamespace(num_steps=lambda stage: stage.epoch_steps)
        steps = lambda stage: (done, stage.epochs * stage.epoch_steps)  # noqa: E731
        run = SimpleNamespace(args=args, batches=batches, steps=steps)
        return train.time_left(run, args.stages[stage - 1], seconds=6.0)

    assert left(1, 10) == ", about 27 min left"
    assert left(2, 50) == ", about 3 min left"
    assert left(2, 75) == ""


def test_a_run_writes_what_it_did(trained):
    events = [event["event"] for event in read_log(trained)]
    stage = [*["step"] * 8, "epoch"] * 2
    assert events == ["start", *stage, *stage, "test"]
    epochs, steps = read_log(trained, "epoch"), read_log(trained, "step")
    numbers = [(epoch["stage"], epoch["epoch"]) for epoch in epochs]
    assert numbers == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert epochs[0]["center"] == 0 < epochs[2]["center"]
    assert [step["step"] for step in steps] == [*range(1, 17)] * 2
    assert steps[-1]["lr"] == steps[-9]["lr"]  # constant
    assert steps[0]["lr"] < steps[1]["lr"]  # warm-up
    assert all(step["gradient_norm"] > 0 for step in steps)
    for i, epoch in enumerate(epochs):  # an epoch's means are those of its steps
        losses = [step["loss"] for step in steps[8 * i : 8 * i + 8]]
        assert epoch["loss"] == pytest.approx(sum(losses) / 8)
        assert epoch["triplets_per_second"] > 0
    settings = read_json(trained / "config.json")
    assert settings["seed"] == 0
    assert settings["label_smoothing"] == [0.0, 0.1]
    stdout = (trained / "stdout.txt").read_text()
    for shown in ("torch", "stage 2, epoch 2 of 2: loss ", "mAP"):
        assert shown in stdout


def test_stages_train_what_they_should(trained, tiny_data, tmp_path):
    """Stage 1 leaves the backbone alone; stage 2 moves it and the centroids."""
    succeeds(train, *tiny_arguments(tiny_data, tmp_path), "--epochs", 2, 0)
    one, both = (load_checkpoint(folder) for folder in (tmp_path, trained))
    torch.manual_seed(0)
    fresh = train.build_model(train.GraFTConfig(**both["config"])).state_dict()
    for name, weight in fresh.items():
        moved = [not torch.equal(state["model"][name], weight) for state in (one, both)]
        if name.startswith("backbone."):
            assert moved == [False, True], name
        elif name == "bottleneck.bias":
            assert moved == [False, False]
        else:
            assert moved == [True, True], name
    assert not one["criterion"]["center.centers"].any()
    assert both["criterion"]["center.centers"].any(1).all()


def test_evaluation_of_the_checkpoint_equals_trainings_to_the_last_digit(trained, tmp_path):
    done = run("evaluate.py", trained, "--json", tmp_path / "again.json")  # the user's own command
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again.json").read_text() == (trained / "metrics.json").read_text()
    metrics = read_json(trained / "metrics.json")
    counts = [metrics[name] for name in ("num_query", "num_gallery", "num_valid")]
    assert counts == [24, 48, 24]
    assert 0 < metrics["mINP"] <= metrics["mAP"] <= 1
    assert metrics["R1"] <= metrics["R5"] <= metrics["R10"] <= 1


def test_passes_validation_bf16_and_several_tokens_run_together(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "LINE_SECONDS", 0)
    more = "--per-pass 4 --val-ids 2 --precision bf16 --epochs 1 --triplet DFF --fusion-tokens 2"
    more += " --data-token 5 --pad 4 --normalise imagenet"
    stdout = succeeds(train, *tiny_arguments(tiny_data, tmp_path), *more.split())
    assert "validation mAP" in stdout
    assert "stage 1: 1 epochs, 4 steps" in stdout  # 2 of 4 identities x 16 samples / 8
    assert "stage 1, epoch 1 of 1, step 3 of 4: loss " in stdout  # a file has no bar
    assert load_checkpoint(tmp_path)["mean"]["tir"] == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("words", ["--epochs 0", "--recipe plus --epochs 1 --batch-size 4"])
def test_the_checkpoint_that_is_announced_evaluates_as_it_trained(tiny_data, tmp_path, words):
    """Also without an epoch; and plus, which tests features behind the BNNeck."""
    stdout = succeeds(train, *tiny_arguments(tiny_data, tmp_path), *words.split())
    assert f"{tmp_path}: config.json, last.pt, log.jsonl, metrics.json" in stdout
    succeeds(evaluate, tmp_path, "--json", tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == (tmp_path / "metrics.json").read_text()


def test_training_in_a_thread_works_without_signals(tiny_data, tmp_path):
    words = [*map(str, tiny_arguments(tiny_data, tmp_path)), *map(str, SHORT), "--workers", "0"]
    results = []
    thread = threading.Thread(target=lambda: results.append(train.train(options.parse(words))))
    thread.start()
    thread.join()
    assert results[0]["num_query"] == 24


@pytest.fixture
def open_run(tiny_data, tmp_path):
    """Starts a run as train.py does, in this process."""
    runs = []

    def start(*more) -> train.Run:
        words = [*tiny_arguments(tiny_data, tmp_path), "--workers", 0, *more]
        runs.append(train.start_run(options.parse([str(word) for word in words])))
        return runs[-1]

    yield start
    for started in runs:
        started.lock.close()


def test_losses_by_identity_warn_where_a_step_takes_several_passes(open_run, capsys):
    open_run("--recipe", "plus", "--batch-size", 4, "--per-pass", 2)
    assert "compares samples within each of 2 passes of a step alone" in capsys.readouterr().err


# --- resuming; one run owns its folder


def test_same_seed_same_run_and_resuming_changes_nothing(trained, open_run, tmp_path):
    """Ended in stage 2 after its first epoch, then resumed by the folder alone."""
    run = open_run("--workers", 2)
    save = run.save

    def save_and_end(optimizer):
        save(optimizer)
        if run.progress.stage == 2:
            raise KeyboardInterrupt

    run.save = save_and_end
    train.train_stage(run, run.args.stages[0])
    with pytest.raises(KeyboardInterrupt):
        train.train_stage(run, run.args.stages[1])
    run.lock.close()
    stdout = succeeds(train, "--out", tmp_path, "--resume")
    assert "stage 1, epoch" not in stdout
    a, b = load_checkpoint(trained), load_checkpoint(tmp_path)
    for name, weight in a["model"].items():
        assert torch.equal(weight, b["model"][name]), name
    assert (tmp_path / "metrics.json").read_text() == (trained / "metrics.json").read_text()


def test_resuming_an_empty_folder_starts_the_run(tiny_data, tmp_path):
    words = [*tiny_arguments(tiny_data, tmp_path), *SHORT, "--resume"]
    assert "stage 1, epoch 1 of 1" in succeeds(train, *words)
    assert "stage 1, epoch 1 of 1" not in succeeds(train, *words)  # it is done


def test_an_occupied_folder_is_left_alone(trained, tiny_data):
    before = (trained / "last.pt").read_bytes()
    assert "holds a run already" in fails(train, *tiny_arguments(tiny_data, trained))
    assert (trained / "last.pt").read_bytes() == before


def test_one_run_owns_its_folder(open_run, tiny_data, tmp_path):
    open_run()
    line = fails(train, *tiny_arguments(tiny_data, tmp_path))
    assert "another process is writing to this folder" in line


def test_the_optimizer_of_stage_1_is_not_stage_2s(open_run, monkeypatch):
    """Resumed at the end of stage 1, stage 2 begins afresh; see D11."""
    run = open_run("--epochs", 1)
    train.train_stage(run, run.args.stages[0])
    run.lock.close()
    resumed = open_run("--epochs", 1, "--resume")
    train.train_stage(resumed, resumed.args.stages[0])  # is done
    assert resumed.stored_optimizer

    def begun(run, stage, parallel, optimizer):
        assert not optimizer.state
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_epoch", begun)
    with pytest.raises(KeyboardInterrupt):
        train.train_stage(resumed, resumed.args.stages[1])


def test_centroids_start_at_the_class_means_of_what_the_loss_sees(open_run):
    run = open_run()
    train.begin_stage(run, run.args.stages[0])
    assert not run.criterion.center.started
    train.begin_stage(run, run.args.stages[1])
    tokens, split = [], run.dataset.train
    run.model.eval()
    for i in range(len(split)):
        images = {name: image[None] for name, image in split[i][0].items()}
        with torch.no_grad():
            tokens.append(run.model(run.embedder.normalise(images)).fusion[0])
    means = [torch.stack(tokens)[split.pids == pid].mean(0) for pid in split.pids.unique()]
    centers = run.criterion.center.centers
    torch.testing.assert_close(centers.data, torch.stack(means), atol=1e-4, rtol=1e-4)
    assert centers.norm(dim=1).min() > 3  # not of length 1: the tokens have a norm of some sqrt(D)
    centers.data.fill_(7.0)  # as if they had moved
    train.begin_stage(run, run.args.stages[1])
    assert (run.criterion.center.centers == 7.0).all()


def test_a_checkpoint_of_another_version_can_be_evaluated_not_resumed(trained, tmp_path):
    old = {k: v for k, v in load_checkpoint(trained).items() if k != "samples"}
    runtime.save_checkpoint(tmp_path / "last.pt", old)
    assert "lacks samples" in fails(train, "--out", tmp_path, "--resume")
    succeeds(evaluate, tmp_path)


# --- mistakes


def test_a_users_mistakes_give_one_line_and_exit_code_2(tiny_data, trained, tmp_path):
    tiny = tiny_arguments(tiny_data, tmp_path / "out")
    foreign = tmp_path / "foreign.pth"
    torch.save({"fc.weight": torch.zeros(3)}, foreign)
    picture = tmp_path / "picture.png"
    Image.new("RGB", (4, 4)).save(picture)
    nowhere = ["--dataset", "rgbnt100", "--data-root", tmp_path / "nowhere"]
    for program, arguments, message in (
        (train, nowhere, "nowhere: no such folder"),
        (train, [*tiny, "--batch-size", 65], "--batch-size 65: an epoch has only 64 triplets"),
        (train, [*tiny, "--batch-size", 1], "BatchNorm cannot train"),
        (train, [*tiny, "--modalities", "rgb,depth"], "depth"),
        (train, [*tiny, "--image-size", 60, 128], "the nearest are --image-size 64 128"),
        (train, [*tiny, "--backbone-weights", foreign], "not the weights of this backbone"),
        (train, [*tiny, "--backbone-weights", "absent.pth"], "weights absent.pth: no such file"),
        (train, [*tiny, "--out", picture], "cannot be created"),
        (train, [*tiny, "--out", "x" * 300], "File name too long"),
        (train, [*tiny, "--val-ids", 4], "--val-ids 4"),
        (evaluate, [picture], "not a checkpoint"),
        (evaluate, [tmp_path / "absent.pt"], "absent.pt: no such file"),
        (evaluate, [trained, "--modalities", "depth"], "the model has no modality depth"),
    ):
        assert message in fails(program, *arguments)
        assert not (tmp_path / "out").exists()


@pytest.fixture
def own_data(tiny_data, tmp_path):
    """A copy of the tiny data set to change, and the options that train on it."""
    root = tmp_path / "synthetic"
    shutil.copytree(tiny_data, root)
    return root / "rgbir", tiny_arguments(root, tmp_path / "out")


@pytest.mark.parametrize("store", [0, 20])
def test_a_broken_image_of_any_split_shows_before_the_first_step(own_data, tmp_path, store):
    root, words = own_data
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        victim = sorted((root / folder).glob("*"))[3]
        content = victim.read_bytes()
        victim.write_bytes(b"")
        assert f"{victim}: " in fails(train, *words, "--store", store, "--workers", 1)
        assert not (tmp_path / "out").exists()
        victim.write_bytes(content)


def test_training_images_alone_train_and_say_that_nothing_was_tested(own_data, tmp_path):
    root, words = own_data
    for folder in ("query", "bounding_box_test"):
        shutil.rmtree(root / folder)
    assert "not tested" in succeeds(train, *words, *SHORT)
    assert not (tmp_path / "out/metrics.json").exists()


def test_one_camera_is_refused_before_training(own_data, tmp_path):
    root, words = own_data
    for path in root.glob("*/*"):
        if "c0001" not in path.name:
            path.unlink()
    assert "another camera" in fails(train, *words)
    assert not (tmp_path / "out").exists()


def test_other_training_samples_cannot_be_resumed(own_data, tmp_path):
    root, words = own_data
    succeeds(train, *words, *SHORT)
    first = sorted((root / "bounding_box_train").glob("*"))[0]
    shutil.copy(first, first.with_name(first.name.replace("_000", "_077")))
    line = fails(train, "--out", tmp_path / "out", "--resume")
    assert "its training samples are not those" in line
