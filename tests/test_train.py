"""The programs as a user runs them, at tiny size.

Schedule, stages, resuming, evaluation to the last digit, mistakes.
"""

import json
import shutil
import sys

import pytest
import torch
from conftest import call, run, tiny_arguments
from PIL import Image

import evaluate
import train
from runtime import load_checkpoint


def test_schedule_by_hand():
    factors = [train.lr_factor(step, 100, 10) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert (
        factors[10] == 1
        and factors[40] == pytest.approx(0.5)
        and factors[89] == pytest.approx((10 / 89) ** 0.5)
    )
    reached = (10 / 90) ** 0.5
    assert factors[90:] == pytest.approx([reached * left / 10 for left in range(10, 0, -1)])
    assert all(0 < factor <= 1 for factor in factors)
    assert [train.lr_factor(step, 4, 100) for step in range(4)] == pytest.approx(
        [0.01, 0.02, 0.03, 0.04]
    )
    assert train.lr_factor(0, 10, 0) == 1


def test_cosine_schedule_by_hand():
    factors = [train.cosine_factor(step, 30, 10) for step in range(30)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1 and factors[20] == pytest.approx(0.5) and 0 < factors[29] < 0.01


def test_recipe_plus_can_be_taken_apart(tiny_data, tmp_path):
    args = train.parse(["--recipe", "plus", "--no-bnneck-features", "--schedule", "sqrt", "sqrt"])
    assert (args.sampling, args.triplet, args.cross_entropy, args.bnneck_features) == (
        "identities",
        "hardest",
        "all",
        False,
    )
    assert [(stage.schedule, stage.label_smoothing) for stage in args.stages] == [("sqrt", 0.1)] * 2
    assert [(stage.epochs, stage.epoch_steps) for stage in args.stages] == [(1, 60), (4, 0)]
    assert args.stages[1].patch_dropout == 0.5
    stages = train.parse(["--recipe", "plus", "--epochs", "2", "4"]).stages
    assert [(stage.epochs, stage.epoch_steps) for stage in stages] == [(2, 0), (4, 0)]
    assert train.parse(["--recipe", "plus", "--patch-dropout", "0", "0"]).stages[1].epochs == 2
    with pytest.raises(
        train.UserError, match=r"--patch-dropout: expected a number from 0 to 0\.95"
    ):
        train.parse(["--patch-dropout", "0", "1"])
    with pytest.raises(train.UserError, match="leaves data token 2 out"):
        train.parse(["--patch-dropout", "0", "0.5", "--data-token", "2"])
    out, plain = (
        tmp_path / "plus",
        ["--schedule", "cosine", "cosine", "--epochs", 1, 1, "--batch-size", 4],
    )
    done = run("train.py", *tiny_arguments(tiny_data, out), "--recipe", "plus", *plain)
    assert done.returncode == 0, done.stderr
    done = run("evaluate.py", out / "last.pt", "--json", tmp_path / "again.json")
    assert (
        done.returncode == 0
        and (tmp_path / "again.json").read_text() == (out / "metrics.json").read_text()
    )
    with pytest.raises(train.UserError, match="of all samples: --cross-entropy all"):
        train.parse(["--triplet", "hardest"])


def test_papers_recipe_is_the_default_of_the_benchmarks():
    args = train.parse(["--dataset", "rgbnt100"])
    first, second = args.stages
    assert (args.backbone, args.image_size, args.positives, args.batch_size) == (
        "deit-b",
        (224, 224),
        8,
        208,
    )
    assert (args.triplet, args.alpha, args.gamma, args.flips, args.erase) == (
        "FFD",
        0.5,
        0.5,
        (0.5, 0.5),
        0.5,
    )
    assert (first.frozen, first.beta, first.label_smoothing, first.schedule) == (True, 0, 0, "sqrt")
    assert (second.frozen, second.beta, second.label_smoothing, second.schedule) == (
        False,
        0.0005,
        0.1,
        "constant",
    )
    assert second.lr == 5e-6
    assert train.parse(["--epochs", "3", "0", "--lr", "1e-4", "2e-4"]).stages[0].lr == 1e-4


def test_a_run_writes_what_it_did(trained):
    events = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    stage = [*["step"] * 8, "epoch"] * 2
    assert [event["event"] for event in events] == ["start", *stage, *stage, "test"]
    epochs = [event for event in events if event["event"] == "epoch"]
    assert [(event["stage"], event["epoch"]) for event in epochs] == [
        (1, 1),
        (1, 2),
        (2, 1),
        (2, 2),
    ]
    assert epochs[0]["center"] == 0 < epochs[2]["center"]
    assert all(event["triplets_per_second"] > 0 for event in epochs)
    steps = [event for event in events if event["event"] == "step"]
    assert [step["step"] for step in steps] == [*range(1, 17)] * 2
    assert (
        steps[-1]["lr"] == steps[-9]["lr"] and steps[0]["lr"] < steps[1]["lr"]
    )  # constant, warm-up
    for i, epoch in enumerate(epochs):  # an epoch's means are those of its steps
        own = steps[8 * i : 8 * i + 8]
        assert epoch["loss"] == pytest.approx(sum(step["loss"] for step in own) / 8)
        assert all(step["gradient_norm"] > 0 for step in own)
    settings = json.loads((trained / "config.json").read_text())
    assert settings["seed"] == 0 and settings["stages"][1]["label_smoothing"] == 0.1
    stdout = (trained / "stdout.txt").read_text()
    assert "torch" in stdout and "stage 2 epoch 2/2" in stdout and "mAP" in stdout


def test_stages_train_what_they_should(trained, tiny_data, tmp_path):
    """Stage 1 leaves the backbone alone; stage 2 moves it and the centroids.

    No stage changes the frozen biases.
    """
    out = tmp_path / "one"
    assert run("train.py", *tiny_arguments(tiny_data, out), "--epochs", 2, 0).returncode == 0
    one, both = (load_checkpoint(folder / "last.pt") for folder in (out, trained))
    torch.manual_seed(0)
    fresh = train.build_model(train.GraFTConfig(**both["config"])).state_dict()
    for name, weight in fresh.items():
        moved_in_one, moved_in_both = (
            not torch.equal(one["model"][name], weight),
            not torch.equal(both["model"][name], weight),
        )
        if name.startswith("backbone."):
            assert not moved_in_one and moved_in_both, name
        elif name == "bottleneck.bias":
            assert not moved_in_one and not moved_in_both
        else:
            assert moved_in_one and moved_in_both, name
    assert (
        not one["criterion"]["center.centers"].any()
        and both["criterion"]["center.centers"].any(1).all()
    )


def test_evaluation_of_the_checkpoint_equals_trainings_to_the_last_digit(trained, tmp_path):
    done = run("evaluate.py", trained / "last.pt", "--json", tmp_path / "again.json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again.json").read_text() == (trained / "metrics.json").read_text()
    metrics = json.loads((trained / "metrics.json").read_text())
    assert (metrics["num_query"], metrics["num_gallery"], metrics["num_valid"]) == (24, 48, 24)
    assert (
        0 < metrics["mINP"] <= metrics["mAP"] <= 1
        and metrics["R1"] <= metrics["R5"] <= metrics["R10"] <= 1
    )


def test_evaluation_on_fewer_modalities(trained, tmp_path):
    done = run(
        "evaluate.py",
        trained / "last.pt",
        "--modalities",
        "rgb,tir",
        "--json",
        tmp_path / "two.json",
    )
    assert done.returncode == 0, done.stderr
    assert (
        json.loads((tmp_path / "two.json").read_text())["mAP"]
        != json.loads((trained / "metrics.json").read_text())["mAP"]
    )


def test_evaluation_on_all_subsets(trained, tmp_path):
    done = run("evaluate.py", trained / "last.pt", "--all-subsets", "--json", tmp_path / "all.json")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "all.json").read_text())
    assert list(metrics) == ["rgb", "nir", "tir", "rgb,nir", "rgb,tir", "nir,tir", "rgb,nir,tir"]
    assert metrics["rgb,nir,tir"] == json.loads((trained / "metrics.json").read_text())
    assert len({figures["mAP"] for figures in metrics.values()}) == 7


def test_any_sensor_asks_and_any_answers(trained, tiny_data, tmp_path):
    done = call(evaluate, trained / "last.pt", "--all-pairs", "--json", tmp_path / "pairs.json")
    assert done.returncode == 0, done.stderr
    pairs = json.loads((tmp_path / "pairs.json").read_text())
    assert len(pairs) == 49
    assert pairs["rgb,nir,tir"] == json.loads((trained / "metrics.json").read_text())
    sides = ["--query-modalities", "rgb", "--gallery-modalities", "nir,tir"]
    done = call(evaluate, trained / "last.pt", *sides, "--json", tmp_path / "pair.json")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "pair.json").read_text())
    assert metrics == pairs["rgb > nir,tir"] != pairs["nir,tir > rgb"]
    # By hand
    cpu = torch.device("cpu")
    embedder, _ = evaluate.load_embedder(trained / "last.pt", cpu, precision="fp32")
    query = train.data.load_dataset("synthetic", tiny_data, ("rgb",), (32, 64)).query
    gallery = train.data.load_dataset("synthetic", tiny_data, ("nir", "tir"), (32, 64)).gallery
    ids = (query.pids, gallery.pids, query.keys, gallery.keys)
    ranked = evaluate.rank_metrics(embedder.embed(query), embedder.embed(gallery), *ids)
    assert metrics["mAP"] == pytest.approx(ranked.mAP, abs=1e-6)
    refused = call(evaluate, trained / "last.pt", *sides, "--all-pairs")
    assert refused.returncode == 2 and "are of one pair of subsets" in refused.stderr


def test_modality_dropout_leaves_at_least_one(tiny_data, tmp_path):
    args = train.parse(["--modality-dropout", "0.6", "--seed", "3", "--out", str(tmp_path / "out")])
    dataset = train.data.load_dataset("synthetic", tiny_data, image_size=(64, 128))
    model = train.build_model(train.model_config(args, dataset))
    run = train.Run(args, torch.device("cpu"), (dataset, None), model)
    kept = [tuple(sorted(run.draw((3, 1, 0, step))[1])) for step in range(1000)]
    assert {len(modalities) for modalities in kept} == {1, 2, 3} and len(set(kept)) == 7
    # 0.4, and 0.072 where it alone is taken back
    assert 0.4 < sum("tir" in modalities for modalities in kept) / 1000 < 0.55


def test_same_seed_same_run_and_resuming_changes_nothing(trained, tiny_data, tmp_path, monkeypatch):
    """Interrupted in stage 2 after its first epoch, then resumed.

    The weights are those of the run that was not interrupted.
    """
    out = tmp_path / "run"
    save = train.Run.save

    def save_then_stop(self, state):
        save(self, state)
        if (self.progress.stage, self.progress.epoch) == (2, 1):
            raise KeyboardInterrupt

    arguments = [str(argument) for argument in tiny_arguments(tiny_data, out)]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    monkeypatch.setattr(train.Run, "save", save_then_stop)
    with pytest.raises(SystemExit, match="130"):
        train.main()
    assert not (out / "metrics.json").exists()
    done = run("train.py", *arguments, "--resume")
    assert done.returncode == 0 and "stage 1 epoch" not in done.stdout, done.stderr
    a, b = load_checkpoint(trained / "last.pt"), load_checkpoint(out / "last.pt")
    for name, weight in a["model"].items():
        assert torch.equal(weight, b["model"][name]), name
    assert (out / "metrics.json").read_text() == (trained / "metrics.json").read_text()


def test_an_occupied_folder_is_left_alone(trained, tiny_data):
    before = (trained / "last.pt").read_bytes()
    done = run("train.py", *tiny_arguments(tiny_data, trained))
    assert (
        done.returncode == 2
        and "holds a run already" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert (trained / "last.pt").read_bytes() == before


def test_passes_checkpointing_validation_and_bf16_run(tiny_data, tmp_path):
    out = tmp_path / "run"
    options = [
        "--per-pass",
        4,
        "--checkpointing",
        "--val-ids",
        2,
        "--precision",
        "bf16",
        "--batch-size",
        8,
        "--epochs",
        1,
        1,
    ]
    done = run(
        "train.py",
        *tiny_arguments(tiny_data, out),
        *options,
        "--triplet",
        "DFF",
        "--fusion-tokens",
        2,
        "--data-token",
        5,
    )
    assert done.returncode == 0, done.stderr
    assert "8 triplets in 2 passes" in done.stdout
    assert "4 + 4 steps" in done.stdout  # 2 of 4 identities x 16 samples / 8
    assert "validation mAP" in done.stdout


def mistakes(tiny_data, trained, tmp_path):
    """(program, arguments, what the line must say)"""
    tiny = tiny_arguments(tiny_data, tmp_path / "out")
    one = tmp_path / "one" / "synthetic"
    shutil.copytree(tiny_data, one)
    for path in (one / "rgbir" / "bounding_box_train").glob("000[234]_*"):
        path.unlink()
    empty = tmp_path / "empty" / "synthetic"
    shutil.copytree(tiny_data, empty)
    for path in (empty / "rgbir" / "query").glob("*"):
        path.unlink()
    cut = tmp_path / "cut" / "synthetic"
    shutil.copytree(tiny_data, cut)
    victim = sorted((cut / "rgbir" / "bounding_box_train").glob("*"))[3]
    victim.write_bytes(victim.read_bytes()[:900])
    foreign = tmp_path / "foreign.pth"
    torch.save({"fc.weight": torch.zeros(3)}, foreign)
    picture = tmp_path / "picture.png"
    Image.new("RGB", (4, 4)).save(picture)
    return [
        (
            train,
            ["--dataset", "rgbnt100", "--data-root", tmp_path / "nowhere"],
            "nowhere: no such folder",
        ),
        (train, ["--dataset", "rgbnt100", "--data-root", tmp_path], "no layout of rgbnt100"),
        (train, [*tiny, "--data-root", empty], "no usable images in split query"),
        (train, [*tiny, "--data-root", one], "identities in the training data is 1"),
        (train, [*tiny, "--data-root", cut], f"{victim.name}: not an image that can be read"),
        (train, [*tiny, "--batch-size", 65], "--batch-size 65: an epoch has only 64 triplets"),
        (train, [*tiny, "--dropout", 2], "--dropout: expected a number from 0 to 1, not 2"),
        (
            train,
            [*tiny, "--batch-size", 0],
            "--batch-size: expected a whole number of at least 1, not 0",
        ),
        (train, [*tiny, "--modalities", "rgb,depth"], "no modality depth"),
        (train, [*tiny, "--image-size", 60, 128], "60x128: patch 16 does not divide"),
        (train, [*tiny, "--backbone-weights", foreign], "not the weights of this backbone"),
        (train, [*tiny, "--backbone-weights", tmp_path / "absent.pth"], "absent.pth: no such file"),
        (train, [*tiny, "--out", picture], "cannot be made"),
        (train, [*tiny, "--val-ids", 4], "identities in the training data is 0"),
        (evaluate, [picture], "not a checkpoint"),
        (evaluate, [tmp_path / "absent.pt"], "absent.pt: no such file"),
        (
            evaluate,
            [trained / "last.pt", "--modalities", "depth"],
            "--modalities depth: the model was trained on rgb,nir,tir",
        ),
    ]


def test_a_users_mistakes_give_one_line_and_exit_code_2(
    tiny_data, trained, tmp_path, monkeypatch, capsys
):
    for program, arguments, message in mistakes(tiny_data, trained, tmp_path):
        monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            program.main()
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert stopped.value.code == 2, arguments
        assert len(lines) == 1 and message in lines[0], (arguments, lines)
        assert not (tmp_path / "out" / "last.pt").exists()


def test_an_unreadable_image_in_a_worker_process_gives_one_line(
    tiny_data, tmp_path, monkeypatch, capsys
):
    root = tmp_path / "synthetic"
    shutil.copytree(tiny_data, root)
    victim = sorted((root / "rgbir" / "bounding_box_train").glob("*"))[0]
    victim.write_bytes(b"")
    options = [*tiny_arguments(root, tmp_path / "out"), "--store", 0, "--workers", 1]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    error = capsys.readouterr().err
    assert f"{victim}: not an image" in error and "Traceback" not in error
