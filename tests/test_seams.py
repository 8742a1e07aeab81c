"""Where parts meet: every fusion through every program, and what use as a whole once broke."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, call, tiny_arguments

import baselines
import data
import evaluate
import prune
import runtime
import train
from extras import pictures, search
from model import BACKBONES, RESNETS, GraFTConfig, build_model

SHORT = ["--epochs", 1, 1, "--epoch-steps", 2, 2]


def succeeds(program, *arguments, **options) -> str:
    done = call(program, *arguments, **options)
    assert done.returncode == 0, (arguments, done.stderr)
    return done.stdout


def fails(program, *arguments) -> str:
    """The one line that a mistake gives."""
    done = call(program, *arguments)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def read(path) -> dict:
    return json.loads(path.read_text())


MODELS = {fusion: ["--fusion", fusion] for fusion in baselines.FUSIONS}
MODELS["plus"] = ["--recipe", "plus", "--schedule", "cosine", "cosine", "--modality-losses", 1]
MODELS["hamnet"] += ["--samples", 6]  # of each of the tiny set's 4 identities, in a batch of 24


@pytest.fixture(scope="module", autouse=True)
def thin_resnets():
    """ResNets of one block a stage, for speed; forked programs have them, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "LAYOUTS", {18: (baselines.resnet.BasicBlock, [1, 1, 1, 1])})
        yield


@pytest.fixture(scope="module", params=MODELS)
def model(request, tiny_data, tmp_path_factory):
    """A model's name, the options that train it, and the folder of its run."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    options = [*tiny_arguments(tiny_data, out), *SHORT, *MODELS[request.param]]
    succeeds(train, *options)
    return request.param, options, out


def test_resumed_where_it_was_done(model):
    _, options, out = model
    before = read(out / "metrics.json")
    stdout = succeeds(train, *options, "--resume")
    assert "stage" not in stdout.partition("in all\n")[2].partition("mAP")[0]
    assert read(out / "metrics.json") == before


def test_evaluated_on_every_subset_mirrored_and_reranked(model, tmp_path):
    _, _, out = model
    more = ["--all-subsets", "--flip", "--rerank", "--json", tmp_path / "subsets.json"]
    stdout = succeeds(evaluate, out / "last.pt", *more)
    results = read(tmp_path / "subsets.json")
    assert len(results) == 7 and all(0 < row["mAP"] <= 1 for row in results.values())
    assert stdout.count("24 queries") == 7
    succeeds(evaluate, out / "last.pt", "--json", tmp_path / "plain.json")
    assert read(tmp_path / "plain.json") == read(out / "metrics.json")


def test_drawn(model, tmp_path):
    name, _, out = model
    files = ["--ranked-list", tmp_path / "list.png", "--failures", tmp_path / "failures.png"]
    succeeds(evaluate, out / "last.pt", *files, "--cmc", tmp_path / "cmc.png")
    assert len(list(tmp_path.glob("*.png"))) == 3
    if name in ("graft", "plus"):
        succeeds(evaluate, out / "last.pt", "--attention", tmp_path / "attention.png")
    else:
        line = fails(evaluate, out / "last.pt", "--attention", tmp_path / "attention.png")
        assert f"--fusion {name} has no fusion tokens" in line
    assert "curves.png" in succeeds(pictures, out)


@pytest.mark.parametrize("structured", [False, True])
def test_pruned(model, tmp_path, structured):
    name, _, out = model
    arguments = [out / "last.pt", "--keep", 0.5, "--rounds", 1, "--epoch-steps", 2]
    arguments += ["--device", "cpu", "--out", tmp_path / "pruned"]
    if structured and name in ("multistream", "hamnet"):
        line = fails(prune, *arguments, "--structured")
        reason = "3 backbones; expected one, shared" if name == "multistream" else "ResNets"
        assert f"--fusion {name} has {reason}" in line
        assert not (tmp_path / "pruned").exists()
        return
    succeeds(prune, *arguments, *(["--structured"] if structured else []))
    succeeds(evaluate, tmp_path / "pruned/0.5.pt", "--flip")
    if name != "graft":
        return
    # and further, from a pruned checkpoint
    arguments[0], arguments[2], arguments[-1] = (
        tmp_path / "pruned/0.5.pt",
        0.4,
        tmp_path / "further",
    )
    succeeds(prune, *arguments, *(["--structured"] if structured else []))


def test_searched_with(model, tiny_data, tmp_path):
    _, _, out = model
    gallery = data.load_dataset("synthetic", tiny_data, image_size=(32, 64)).gallery
    for i in range(3):
        for modality, image in gallery[i][0].items():
            path = tmp_path / "photos" / modality / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            data.Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    npz, photo = tmp_path / "gallery.npz", tmp_path / "photos/nir/1.png"
    succeeds(search, out / "last.pt", "index", tmp_path / "photos", "--out", npz)
    picture = ["--picture", tmp_path / "found.png"]
    assert "   1" in succeeds(search, out / "last.pt", "query", npz, f"nir={photo}", *picture)


def test_trained_evaluated_and_pruned_on_two_ranks(model, tmp_path):
    name, options, _ = model
    if name == "hamnet":
        return  # test_hamnet.py trains it on two ranks
    options = [tmp_path / "run" if option == options[3] else option for option in options]
    succeeds(train, *options, ranks=2)
    succeeds(evaluate, tmp_path / "run/last.pt", ranks=2)
    if name not in ("graft", "multistream", "hamnet"):
        return
    quick = ["--rounds", 1, "--epoch-steps", 1, "--device", "cpu", "--out", tmp_path / "pruned"]
    succeeds(prune, tmp_path / "run/last.pt", "--keep", 0.5, *quick, ranks=2)


# --- centroids


def open_run(tiny_data, out, *more) -> train.Run:
    arguments = [*tiny_arguments(tiny_data, out), "--workers", 0, *more]
    return train.start_run(train.parse([str(argument) for argument in arguments]))


def class_means(run: train.Run) -> torch.Tensor:
    """Of the fusion tokens as the center loss gets them: straight from the model."""
    tokens, train_split = [], run.dataset.train
    run.model.eval()
    for i in range(len(train_split)):
        images = {name: image[None] for name, image in train_split[i][0].items()}
        with torch.no_grad():
            tokens.append(run.model(run.embedder.normalise(images)).fusion[0])
    run.model.train()
    pids = run.dataset.train.pids
    return torch.stack([torch.stack(tokens)[pids == pid].mean(0) for pid in run.label_pids])


@pytest.mark.parametrize("recipe", ["paper", "plus"])
def test_centroids_start_at_the_class_means_of_what_the_loss_sees(tiny_data, tmp_path, recipe):
    more = [] if recipe == "paper" else MODELS["plus"]
    run = open_run(tiny_data, tmp_path, *more)
    train.begin_stage(run, run.args.stages[0])
    assert not run.criterion.center.started
    train.begin_stage(run, run.args.stages[1])
    centers = run.criterion.center.centers
    torch.testing.assert_close(centers.data, class_means(run), atol=1e-4, rtol=1e-4)
    assert centers.norm(dim=1).min() > 3  # not of length 1: the tokens have a norm of some sqrt(D)


def test_centroids_go_on_through_stages_resumes_and_pruning(tiny_data, tmp_path):
    run = open_run(tiny_data, tmp_path / "run", "--beta", 0.001, 0.001)
    train.begin_stage(run, run.args.stages[0])
    run.criterion.center.centers.data.fill_(7.0)  # as if they had moved
    train.begin_stage(run, run.args.stages[1])
    assert (run.criterion.center.centers == 7.0).all()
    run.save({})
    seen = prune.parse(
        [str(tmp_path / "run/last.pt"), "--keep", "0.5", "--out", str(tmp_path / "p")]
    )
    pruned, _ = prune.open_run(seen)
    stage = prune.finetuning(pruned.args.stages[1], seen)
    prune.finetune(pruned, train.replace(stage, number=3, epochs=0), 10**6, structured=False)
    train.begin_stage(pruned, stage)
    assert (pruned.criterion.center.centers == 7.0).all()


# --- resuming with other settings


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        (1, ["--beta", 0.01, 0.01]),
        (1, ["--frozen", "no", "no"]),
        (2, ["--beta", 0, 0]),
        (2, ["--beta", 0.01, 0.01]),
        (2, ["--frozen", "yes", "yes"]),
        (2, ["--lr", 1e-4, 1e-4]),
        (2, ["--precision", "bf16"]),
        (2, ["--per-pass", 4]),
    ],
)
def test_resumed_in_mid_epoch_with_other_settings(tiny_data, tmp_path, stage, change):
    options = [*tiny_arguments(tiny_data, tmp_path), "--epochs", 1, 1]
    run = open_run(tiny_data, tmp_path, "--epochs", 1, 1)
    if stage == 2:
        run.progress = train.Progress(2)
    half_way(run, run.args.stages[stage - 1])
    stdout = succeeds(train, *options, *change, "--resume")
    assert f"resumed with another {change[0]}" in stdout
    assert read(tmp_path / "metrics.json")["mAP"] > 0
    epochs = [line for line in log(tmp_path) if line["event"] == "epoch"]
    assert [epoch["stage"] for epoch in epochs] == list(range(stage, 3))


def half_way(run: train.Run, stage: train.Stage) -> None:
    """Train half of an epoch, then stop, saved."""
    status, calls = train.status, []

    def after_four(sums, optimizer):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGTERM)
        return status(sums, optimizer)

    train.status = after_four
    try:
        with pytest.raises(runtime.Stopped):
            train.train_stage(run, stage)
    finally:
        train.status = status


def log(out) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "change", [["--batch-size", 4], ["--positives", 2], ["--epoch-steps", 6, 6], ["--seed", 1]]
)
def test_what_an_epoch_is_made_of_cannot_change_in_the_middle_of_it(tiny_data, tmp_path, change):
    run = open_run(tiny_data, tmp_path, "--epochs", 1, 1)
    half_way(run, run.args.stages[0])
    before = (tmp_path / "last.pt").read_bytes()
    options = [*tiny_arguments(tiny_data, tmp_path), "--epochs", 1, 1, "--resume", *change]
    done = call(train, *options)
    assert done.returncode == 2 and "is 4 steps into an epoch that was drawn with" in done.stderr
    assert change[0] in done.stderr and (tmp_path / "last.pt").read_bytes() == before


def test_between_epochs_it_may(tiny_data, tmp_path):
    run = open_run(tiny_data, tmp_path, "--epochs", 2, 0)
    train.train_stage(run, train.replace(run.args.stages[0], epochs=1))
    options = [*tiny_arguments(tiny_data, tmp_path), "--epochs", 2, 0, "--resume"]
    stdout = succeeds(train, *options, "--batch-size", 4)
    assert "stage 1: 32 steps in 2 epochs, 1 to go" in stdout and "epoch 2/2" in stdout


def test_the_optimizer_of_stage_1_is_not_stage_2s(tiny_data, tmp_path, monkeypatch):
    """Resumed at the end of stage 1, stage 2 begins afresh; slip 8 of the published code."""
    run = open_run(tiny_data, tmp_path, "--epochs", 1, 1)
    train.train_stage(run, run.args.stages[0])
    restored = []
    monkeypatch.setattr(train, "restore_optimizer", lambda *given: restored.append(given))
    options = [*tiny_arguments(tiny_data, tmp_path), "--epochs", 1, 1, "--resume"]
    train.train(train.parse([str(option) for option in options]))
    assert not restored


# --- signals, files, numbers


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_whole_group_saves_though_processes_read(tiny_data, tmp_path, number, code):
    """As Slurm and a terminal send it: to the main process and to its readers at once."""
    options = tiny_arguments(tiny_data, tmp_path / "run")
    more = ["--store", 0, "--workers", 2, "--epochs", 400, 0, "--log-every", 1]
    program = subprocess.Popen(
        [sys.executable, "train.py", *map(str, [*options, *more])],
        cwd=ROOT, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    log_file = tmp_path / "run/log.jsonl"
    while not (log_file.exists() and '"step"' in log_file.read_text()):
        time.sleep(0.1)
        assert program.poll() is None
    os.killpg(program.pid, number)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == code and "resume with --resume" in errors, errors
    assert "Traceback" not in errors and len(errors.splitlines()) == 1
    progress = runtime.load_checkpoint(tmp_path / "run/last.pt")["progress"]
    assert progress["epoch"] + progress["step"] > 0


def test_no_epochs_still_leave_the_checkpoint_that_is_announced(tiny_data, tmp_path):
    stdout = succeeds(train, *tiny_arguments(tiny_data, tmp_path), "--epochs", 0, 0)
    assert f"{tmp_path}: last.pt, log.jsonl, config.json, metrics.json" in stdout
    succeeds(evaluate, tmp_path / "last.pt", "--json", tmp_path / "again.json")
    assert read(tmp_path / "again.json") == read(tmp_path / "metrics.json")


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["--seed", -1], "--seed: expected a whole number of at least 0, not -1"),
        (["--label-smoothing", 2, 2], "--label-smoothing: expected a number from 0 to 1, not 2"),
        (["--lr", "nan", 1], "--lr: expected a number of at least 0, not nan"),
        (["--lr", 1, "inf"], "--lr: expected a number of at least 0, not inf"),
        (["--weight-decay", -1, 0], "--weight-decay: expected a number of at least 0, not -1"),
        (["--epochs", 1.5, 1], "--epochs: expected a whole number of at least 0, not 1.5"),
        (["--image-size", 0, 64], "--image-size: expected a whole number from 1 to 4096, not 0"),
        (["--flips", 0.5, 1.1], "--flips: expected a number from 0 to 1, not 1.1"),
        (["--adam-betas", 1, 0, 0, 0], "--adam-betas: expected a number from 0 to 0.999999"),
        (["--cooldown", 2], "--cooldown: expected a number from 0 to 1, not 2"),
        (["--encoder-heads", 0], "--encoder-heads: expected a whole number from 1 to 1000, not 0"),
        (["--seed", 10**30], "--seed: expected a whole number of at least 0, not 1000"),
        (["--warmup-steps", "9" * 400], "--warmup-steps: expected a whole number of at least 0"),
        (["--out", "x" * 300], "File name too long"),
        (["--per-pass", 0], "--per-pass: expected a whole number of at least 1, not 0"),
        (["--log-every", -1], "--log-every: expected a whole number of at least 0, not -1"),
        (["--modalities", "rgb,rgb"], "--modalities: expected different names"),
        (["--sampling", "identities"], "--sampling identities has no anchors"),
        (["--epoch", 1], "unrecognized arguments: --epoch 1"),
    ],
)
def test_every_number_has_its_range(tiny_data, tmp_path, option, expected):
    line = fails(train, *tiny_arguments(tiny_data, tmp_path / "out"), *option)
    assert expected in line and not (tmp_path / "out").exists()


def test_a_file_without_a_name_is_refused(trained):
    assert "not the name of a file" in fails_after_all(evaluate, trained / "last.pt", "--json", ".")


def fails_after_all(program, *arguments) -> str:
    """The last line of a program that had printed figures before its mistake was met."""
    done = call(program, *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_a_mistake_on_the_command_line_is_said_once_by_all_ranks(tiny_data, tmp_path):
    done = call(train, *tiny_arguments(tiny_data, tmp_path), "--batch-sizee", 3, ranks=2)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_every_default_is_in_the_help_and_is_the_data_sets(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for dataset, shown in (
        ("synthetic", ["(default: 0.0025 0.0012)", "(default: 26)", "(default: 2 2)"]),
        ("rgbnt100", ["(default: 2.54e-05 5e-06)", "(default: 208)", "(default: 40 60)"]),
    ):
        done = call(train, "--dataset", dataset, "--help")
        text = " ".join(done.stdout.split())
        assert done.returncode == 0 and all(default in text for default in shown)


def test_rgbn300_has_its_own_recipe():
    first, second = train.parse(["--dataset", "rgbn300"]).stages
    assert (first.lr, first.weight_decay) == (2e-5, 0.001)
    assert (second.weight_decay, second.betas) == (1.58e-4, (0.759, 0.986))


def test_every_setting_of_the_optimiser_and_encoder_has_a_flag(tiny_data, tmp_path):
    options = ["--adam-betas", 0.8, 0.9, 0.7, 0.95, "--cooldown", 0.5]
    options += ["--encoder-heads", 4, "--encoder-hidden", 64]
    args = train.parse([str(option) for option in options])
    assert [stage.betas for stage in args.stages] == [(0.8, 0.9), (0.7, 0.95)]
    early, late = (train.schedule_factor(args, args.stages[0], step, 100) for step in (45, 75))
    assert late < 0.5 * early
    run = open_run(tiny_data, tmp_path, *options)
    encoder = run.model.encoders["rgb"]
    assert encoder.self_attn.heads == 4 and encoder.linear1.out_features == 64


def test_pruning_resumed_keeps_its_log(trained, tmp_path, monkeypatch):
    options = ["--rounds", 2, "--epoch-steps", 1, "--device", "cpu", "--out", str(tmp_path)]
    arguments = [str(trained / "last.pt"), "--keep", "0.5", *map(str, options)]
    finetune = prune.finetune

    def once(*given):
        if given[1].number == 4:
            raise KeyboardInterrupt
        finetune(*given)

    monkeypatch.setattr(prune, "finetune", once)
    with pytest.raises(KeyboardInterrupt):
        prune.prune_model(prune.parse(arguments))
    before = log(tmp_path)
    assert [line["stage"] for line in before] == [3, 3]  # a step and an epoch
    monkeypatch.setattr(prune, "finetune", finetune)
    prune.prune_model(prune.parse([*arguments, "--resume"]))
    assert log(tmp_path)[: len(before)] == before
    assert [line["stage"] for line in log(tmp_path)] == [3, 3, 4, 4]


def test_the_report_of_a_step_that_is_not_finite_names_all_ranks_samples(tiny_data, tmp_path):
    class Diverging:
        __name__ = "train"

        def main(self) -> None:
            forward = train.Objective.forward

            def diverged(self, *given):
                scale = float("nan") if runtime.rank() == 1 else 1.0
                return {name: value * scale for name, value in forward(self, *given).items()}

            train.Objective.forward = diverged
            train.main()

    done = call(Diverging(), *tiny_arguments(tiny_data, tmp_path), ranks=2)
    assert done.returncode == 2 and "loss or gradient is not finite" in done.stderr
    record = log(tmp_path)[-1]
    assert record["event"] == "not finite" and len(record["batch"]) == 24


# --- what is tested


def bnneck_model():
    torch.manual_seed(0)
    size = dict(image_size=(16, 32), dim=32, depth=1, heads=2, encoder_heads=2, encoder_hidden=32)
    model = build_model(GraFTConfig(("rgb", "tir"), **size, bnneck_features=True)).eval()
    torch.nn.init.normal_(model.bottleneck.running_mean)  # as after training
    torch.nn.init.uniform_(model.bottleneck.running_var, 0.5, 2.0)
    return model


def embedder_of(model) -> evaluate.Embedder:
    half = dict.fromkeys(model.config.modalities, (0.5, 0.5, 0.5))
    return evaluate.Embedder(model, half, half, torch.device("cpu"), "fp32", 0)


def test_mirrored_images_change_nothing_about_symmetric_ones():
    embedder = embedder_of(bnneck_model())
    left = torch.randn(4, 3, 16, 16)
    images = {name: torch.cat([left, left.flip(-1)], -1) for name in ("rgb", "tir")}
    plain, mirrored = embedder.features(images), embedder.features(images, flip=True)
    torch.testing.assert_close(F.cosine_similarity(plain, mirrored), torch.ones(4))


def test_reliance_is_that_of_what_is_ranked(tiny_data):
    model = bnneck_model()
    embedder = embedder_of(model)
    split = data.load_dataset("synthetic", tiny_data, ("rgb", "tir"), (16, 32)).query
    turned = pictures.reliance(embedder, split)
    images = {name: image[None] for name, image in split[3][0].items()}
    images = embedder.normalise(images)
    whole, rgb = embedder.features(images), embedder.features({"rgb": images["rgb"]})
    assert turned[3, 1].item() == pytest.approx(1 - (whole @ rgb.T).item(), abs=1e-5)


def test_the_data_token_can_be_tested(tiny_data, tmp_path):
    """Published DDD, DFF, DFD and DDF are tested on it."""
    out = tmp_path / "run"
    options = [*tiny_arguments(tiny_data, out), *SHORT, "--triplet", "DDD"]
    succeeds(train, *options, "--test-token", "data")
    for token in ("fusion", "data"):
        json_file = tmp_path / f"{token}.json"
        succeeds(evaluate, out / "last.pt", "--test-token", token, "--json", json_file)
    assert read(tmp_path / "data.json") == read(out / "metrics.json")
    assert read(tmp_path / "fusion.json") != read(out / "metrics.json")
    embedder, _ = evaluate.load_embedder(out / "last.pt", torch.device("cpu"), precision="fp32")
    assert embedder.model.config.test_token == "data"
    json_file = tmp_path / "bnneck.json"
    bnneck = ["--test-token", "fusion", "--bnneck-features", "--json", json_file]
    succeeds(evaluate, out / "last.pt", *bnneck)
    assert read(json_file) != read(tmp_path / "fusion.json")
    assert "the data token has no BNNeck" in fails(evaluate, out / "last.pt", "--bnneck-features")
    images = {name: torch.randn(2, 3, 32, 64) for name in ("rgb", "nir", "tir")}
    expected = F.normalize(embedder.model(images).data)
    torch.testing.assert_close(embedder.features(images), expected)
    line = fails(
        train, *options, "--test-token", "data", "--bnneck-features", "--out", tmp_path / "x"
    )
    assert "the data token has no BNNeck" in line


def test_subsets_that_rank_different_queries_say_so(tmp_path):
    """A query without the only chosen sensor is named, counted and missing from its row."""
    torch.manual_seed(0)
    for split, pids in (("train", (1, 2)), ("query", (8, 9)), ("gallery", (8, 9))):
        for modality in ("rgb", "tir"):
            for pid in pids:
                for camera in (1, 2):
                    if (split, modality, pid, camera) == ("query", "tir", 9, 2):
                        continue
                    path = tmp_path / "set" / split / modality / f"{pid}_c{camera}_0.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    pixels = torch.randint(256, (16, 32, 3), dtype=torch.uint8).numpy()
                    data.Image.fromarray(pixels).save(path)
    options = ["--dataset", "folder", "--data-root", tmp_path / "set", "--out", tmp_path / "run"]
    options += ["--backbone", "small", "--backbone-weights", "none", "--image-size", 16, 32]
    succeeds(train, *options, "--epochs", 0, 0, "--batch-size", 2, "--positives", 1)
    done = call(evaluate, tmp_path / "run/last.pt", "--all-subsets")
    assert done.returncode == 0, done.stderr
    assert "1 of 4 query samples have none of tir and are left out: 9_c2_0" in done.stderr
    counts = [line.partition("(")[2] for line in done.stdout.splitlines() if "mAP" in line]
    assert [count.split(",")[0] for count in counts] == ["4 queries", "3 queries", "4 queries"]
    assert "the rows rank different queries" in done.stdout


def test_hardware_is_asked_once(monkeypatch):
    runtime.bf16_is_fast.cache_clear()
    reads = []
    read_text = runtime.Path.read_text
    monkeypatch.setattr(
        runtime.Path, "read_text", lambda self: reads.append(self) or read_text(self)
    )
    for _ in range(3):
        runtime.autocast(torch.device("cpu"), "auto")
    assert len(reads) <= 1


def test_a_pruned_small_model_of_each_fusion_keeps_its_counts():
    for fusion in baselines.FUSIONS:
        row = RESNETS["resnet18"] if fusion == "hamnet" else BACKBONES["small"]
        config = GraFTConfig(image_size=(32, 64), fusion=fusion, **row)
        built = build_model(config)
        for layer in prune.layers(built).values():
            layer.weight.data[layer.weight == 0] = 1.0  # of millions drawn one may be exactly 0
        assert prune.prunable(built) == prune.kept(built) > 0


def test_queries_of_one_sensor_find_a_gallery_of_another(tiny_data, tmp_path):
    """Though neither split has the sensor of the other; what cannot be ranked is one line."""
    out, root = tmp_path / "run", tmp_path / "data"
    source = data.load_dataset("synthetic", tiny_data)
    for split, modalities in (
        ("train", ("rgb", "tir")),
        ("query", ("tir",)),
        ("gallery", ("rgb",)),
    ):
        for modality in modalities:
            folder = root / split / modality
            folder.mkdir(parents=True)
            for images, pid, key in getattr(source, split):
                name = f"{pid}_c{key + 1}_{len(list(folder.iterdir()))}.png"
                pixels = images[modality].permute(1, 2, 0).numpy()
                data.Image.fromarray(pixels).save(folder / name)
    options = [*tiny_arguments(root, out), "--dataset", "folder", "--backbone", "small", *SHORT]
    succeeds(train, *options, "--modalities", "rgb,tir")
    sides = ["--query-modalities", "tir", "--gallery-modalities", "rgb"]
    stdout = succeeds(evaluate, out / "last.pt", *sides, "--ranked-list", tmp_path / "list.png")
    assert "24 queries, 48 gallery samples" in stdout
    sides = ["--query-modalities", "rgb", "--gallery-modalities", "rgb,tir"]
    done = call(evaluate, out / "last.pt", *sides)
    line = done.stderr.splitlines()[-1]  # after warnings of what the samples lack
    assert done.returncode == 2 and "error: 24 of 24 query samples have none of rgb" in line
