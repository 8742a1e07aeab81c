"""What goes wrong on shared machines and in strangers' files.

Runs go on to the bit, or end with a line and lose nothing.
"""

import json
import os
import resource
import signal
import socket
import subprocess
import sys

import faults
import fuzz
import numpy as np
import pytest
import torch
from conftest import ROOT, call, run, tiny_arguments, torchrun
from PIL import Image

import data
import evaluate
import runtime
import train


def arguments(tiny_data, out, *more) -> list[str]:
    """A short run of both stages: 8 steps each."""
    short = ["--epochs", 1, 1, "--checkpoint-every", 3]
    return [str(a) for a in (*tiny_arguments(tiny_data, out), *short, *more)]


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory):
    """A run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole")
    faults.run(arguments(tiny_data, out))
    return out


def main(program, monkeypatch, *argv) -> int:
    """Exit code of a program called here."""
    monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, argv)])
    with pytest.raises(SystemExit) as end:
        program.main()
    return end.value.code


# --- going on


@pytest.mark.parametrize("fault", [("time", 1.0), ("write", 4)])
def test_killed_and_resumed_it_ends_as_if_nothing_had_been(tiny_data, whole, tmp_path, fault):
    faults.run(arguments(tiny_data, tmp_path), fault)
    faults.run(arguments(tiny_data, tmp_path, "--resume"))
    assert not faults.different(faults.outcome(whole), faults.outcome(tmp_path))
    assert not list(tmp_path.glob(".*"))  # what was half-written is gone


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_and_saves(
    tiny_data, whole, tmp_path, monkeypatch, capsys, number, code
):
    prepare, steps = train.Run.prepare, []

    def signalled(*given):
        steps.append(given)
        if len(steps) == 5:
            os.kill(os.getpid(), number)
        return prepare(*given)

    monkeypatch.setattr(train.Run, "prepare", signalled)
    assert main(train, monkeypatch, *arguments(tiny_data, tmp_path)) == code
    assert (
        "stopped after stage 1, epoch 1, step 5 of 8: resume with --resume"
        in capsys.readouterr().err
    )
    assert runtime.load_checkpoint(tmp_path / "last.pt")["progress"]["step"] == 5
    assert main(train, monkeypatch, *arguments(tiny_data, tmp_path, "--resume")) == 0
    assert not faults.different(faults.outcome(whole), faults.outcome(tmp_path))


RESTARTED = """
import os, sys, train
draw = train.Run.draw
def deadly(run, key):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if key[1:] == (2, 0, 4) and os.environ["RANK"] == "1" and first:
        os.kill(os.getpid(), 9)
    return draw(run, key)
train.Run.draw = deadly
train.main()
"""


def test_torchrun_restarts_a_killed_rank_from_the_last_checkpoint(tiny_data, tmp_path):
    done = call(train, *arguments(tiny_data, tmp_path / "whole"), ranks=2)
    assert done.returncode == 0, done.stderr
    program = ["--max-restarts", 1, "--no-python", sys.executable, "-c", RESTARTED]
    done = torchrun(2, *program, *arguments(tiny_data, tmp_path / "killed"))
    assert done.returncode == 0, done.stderr
    assert not faults.different(
        faults.outcome(tmp_path / "whole"), faults.outcome(tmp_path / "killed")
    )


def test_new_settings_win_and_are_said(tiny_data, whole, tmp_path, monkeypatch, capsys):
    faults.run(arguments(tiny_data, tmp_path), ("write", 4))
    more = ["--resume", "--gamma", 0.25, "--weight-decay", 0.0, 0.0]
    assert main(train, monkeypatch, *arguments(tiny_data, tmp_path, *more)) == 0
    said = capsys.readouterr().out
    assert (
        "another --gamma: 0.25, not 0.5" in said
        and "another --weight-decay: (0.0, 0.0), not (0.05, 0.05)" in said
    )
    assert faults.different(faults.outcome(whole), faults.outcome(tmp_path))


def test_another_model_or_other_identities_cannot_be_resumed(tiny_data, whole, monkeypatch, capsys):
    before = (whole / "last.pt").read_bytes()
    assert (
        main(train, monkeypatch, *arguments(tiny_data, whole, "--resume", "--fusion-tokens", 2))
        == 2
    )
    assert "its model has fusion_tokens 1, not 2" in capsys.readouterr().err
    assert main(train, monkeypatch, *arguments(tiny_data, whole, "--resume", "--val-ids", 2)) == 2
    assert "its model has num_ids 4, not 2" in capsys.readouterr().err
    assert (whole / "last.pt").read_bytes() == before


def test_the_log_does_not_depend_on_the_number_of_workers(tiny_data, whole, tmp_path, monkeypatch):
    options = ["--store", 0, "--workers", 2, "--deterministic"]
    assert main(train, monkeypatch, *arguments(tiny_data, tmp_path, *options)) == 0
    torch.use_deterministic_algorithms(False)
    assert faults.log(tmp_path) == faults.log(whole)


# --- ending with a line


def test_a_loss_that_is_not_finite_stops_before_the_weights(
    tiny_data, tmp_path, monkeypatch, capsys
):
    step = train.Objective.forward
    calls = []

    def diverged(self, *given):
        calls.append(given)
        losses = step(self, *given)
        return {
            name: value * (float("nan") if len(calls) == 5 else 1) for name, value in losses.items()
        }

    monkeypatch.setattr(train.Objective, "forward", diverged)
    assert main(train, monkeypatch, *arguments(tiny_data, tmp_path)) == 2
    line = capsys.readouterr().err
    assert (
        "stage 1, epoch 1, step 5: loss or gradient is not finite; losses {'loss': nan" in line
        and "000" in line
    )
    checkpoint = runtime.load_checkpoint(tmp_path / "last.pt")
    assert checkpoint["progress"]["step"] == 3
    assert all(weight.isfinite().all() for weight in checkpoint["model"].values())
    record = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert record["event"] == "not finite" and len(record["batch"]) == 24


def test_a_full_disk_leaves_the_checkpoint_before(tiny_data, tmp_path):
    faults.run(arguments(tiny_data, tmp_path), ("write", 3))
    before = (tmp_path / "last.pt").read_bytes()

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    done = run("train.py", *arguments(tiny_data, tmp_path, "--resume"), preexec_fn=limit)
    assert (
        done.returncode == 2
        and "last.pt: cannot be written" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert (tmp_path / "last.pt").read_bytes() == before and not list(tmp_path.glob(".*"))


def test_damaged_files_are_refused_in_one_line_or_read_right(tmp_path):
    for files, read in (
        (fuzz.checkpoints(tmp_path), fuzz.read_checkpoint),
        (fuzz.images(tmp_path), fuzz.read_image),
    ):
        outcomes = fuzz.fuzz(files, read, 60, seed=1)
        assert sum(outcomes.values()) == 60 and {end for _, end in outcomes} <= {
            "refused",
            "right",
        }, outcomes


@pytest.mark.parametrize(
    "change",
    [
        {"dim": 10**9}, {"depth": 10**9}, {"modalities": ("rgb",) * 10**4},
        {"image_size": (2**19, 2**19)}, {"num_ids": 2**19}, {"encoder_hidden": 2**19},
        {"heads": 0}, {"dim": "32"}, {"blocks": ((1, 2**40),)}, {"fusion": "other"},
    ],
)  # fmt: skip
def test_sizes_in_a_checkpoint_are_checked_before_memory_is_taken(tmp_path, change):
    path = fuzz.checkpoints(tmp_path)[0]
    checkpoint = torch.load(path)
    torch.save({**checkpoint, "config": {**checkpoint["config"], **change}}, path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(runtime.UserError):
        evaluate.load_model(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # kB


# --- strange images


def save(path, mode, size=(32, 16), **options):
    Image.new(mode, size, 100 if len(Image.new(mode, (1, 1)).getbands()) == 1 else None).save(
        path, **options
    )
    return path


def test_images_of_every_kind_are_read_or_refused_by_name(tmp_path):
    for mode, suffix in (
        ("L", "png"),
        ("P", "png"),
        ("1", "png"),
        ("LA", "png"),
        ("RGBA", "png"),
        ("CMYK", "jpg"),
    ):
        image = data.read_image(save(tmp_path / f"{mode}.{suffix}", mode))
        assert (image.mode, image.size) == ("RGB", (32, 16))
    assert data.read_image(tmp_path / "L.png").getpixel((0, 0)) == (100, 100, 100)
    orientation = Image.Exif()
    orientation[0x0112] = 6  # lies on its side
    assert data.read_image(save(tmp_path / "turned.jpg", "RGB", exif=orientation)).size == (16, 32)
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("no image")
    save(tmp_path / "other.gif", "L").rename(tmp_path / "gif.png")
    for path, message in [
        (save(tmp_path / "deep.png", "I;16"), "more than 8 bits"),
        (save(tmp_path / "bomb.png", "1", (12000, 12000)), "12000x12000 pixels, more than"),
        (tmp_path / "empty.png", "not an image"),
        (tmp_path / "text.jpg", "not an image"),
        (tmp_path / "gif.png", "not an image"),
    ]:
        with pytest.raises(runtime.UserError, match=message) as refused:
            data.read_image(path)
        assert str(path) in str(refused.value)


def folder_set(root, modalities, ids=3, cameras=2, captures=2):
    """A data set in the `folder` layout, of noise."""
    draw = np.random.default_rng(0)
    for split, first in (("train", 1), ("query", 101), ("gallery", 101)):
        for modality in modalities:
            (root / split / modality).mkdir(parents=True)
            for pid in range(first, first + ids):
                for camera in range(1, cameras + 1):
                    for i in range(captures):
                        pixels = draw.integers(0, 256, (32, 64, 3), np.uint8)
                        Image.fromarray(pixels).save(
                            root / split / modality / f"{pid}_c{camera}_{i}.png"
                        )
    return root


def test_a_whole_data_set_is_checked_at_once(tmp_path):
    root = folder_set(tmp_path / "folder", ("rgb", "tir"))
    assert data.check("folder", root) == []
    (root / "train/rgb/1_c1_0.png").write_bytes(b"cut")
    (root / "train/rgb/nameless.png").write_bytes(b"")
    (root / "query/tir/101_c1_0.png").unlink()
    (tmp_path / "secret.png").write_bytes((root / "gallery/rgb/101_c1_0.png").read_bytes())
    (root / "gallery/rgb/103_c1_9.png").symlink_to(tmp_path / "secret.png")
    for modality in ("rgb", "tir"):
        (root / f"query/{modality}/999_c1_0.png").write_bytes(
            (root / "train/tir/1_c1_0.png").read_bytes()
        )
        for name in ("2_c1_1", "2_c2_0", "2_c2_1"):
            (root / f"train/{modality}/{name}.png").unlink()
        (root / f"gallery/{modality}/1_c7_0.png").write_bytes(
            (root / "train/tir/1_c1_0.png").read_bytes()
        )
    wrong = data.check("folder", root)
    expected = [
        "nameless: no identity", "out of the data set", "1_c1_0.png: not an image",
        "query: 101_c1_0 lacks tir", "identity 2 has a single sample",
        "query: 999_c1_0 has no match", "identity 1 is in the training data and",
    ]  # fmt: skip
    assert all(sum(part in line for line in wrong) == 1 for part in expected) and len(wrong) == len(
        expected
    ), wrong
    done = run("data.py", "--check", "--dataset", "folder", "--data-root", root)
    assert (
        done.returncode == 2
        and done.stdout.splitlines()[-7:] == wrong
        and "7 things are wrong" in done.stderr
    )
    with pytest.raises(runtime.UserError, match="nameless: no identity"):
        data.load_dataset("folder", root)


# --- odd worlds


@pytest.mark.parametrize("modalities", [("depth",), ("a", "b", "c", "d", "e", "f")])
def test_one_modality_or_six_in_a_folder_with_an_odd_name(tmp_path, monkeypatch, modalities):
    root = folder_set(tmp_path / "Fotos für Ä 写真", modalities)
    out = tmp_path / "out put" / "é"
    options = [
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--out",
        out,
        "--backbone",
        "small",
        "--backbone-weights",
        "none",
    ]
    quick = [
        "--image-size",
        32,
        64,
        "--epochs",
        1,
        1,
        "--positives",
        1,
        "--batch-size",
        5,
        "--precision",
        "fp32",
    ]
    assert main(train, monkeypatch, *options, *quick) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["num_query"] == metrics["num_gallery"] == 12
    assert evaluate.load_model(out / "last.pt")[0].config.modalities == modalities


def test_one_camera_only_leaves_no_match(tmp_path, monkeypatch, capsys):
    root = folder_set(tmp_path / "folder", ("rgb",), cameras=1, captures=4)
    options = [
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--out",
        tmp_path / "out",
        "--backbone",
        "small",
    ]
    quick = [
        "--backbone-weights",
        "none",
        "--image-size",
        32,
        64,
        "--epochs",
        0,
        0,
        "--batch-size",
        2,
    ]
    assert main(train, monkeypatch, *options, *quick) == 2
    assert (
        "none of 12 queries has a gallery sample of its identity from another camera"
        in capsys.readouterr().err
    )


def test_a_batch_of_one_is_refused_before_anything_is_written(
    tiny_data, tmp_path, monkeypatch, capsys
):
    assert main(train, monkeypatch, *arguments(tiny_data, tmp_path / "out", "--batch-size", 1)) == 2
    assert (
        "BatchNorm cannot train on the one anchor" in capsys.readouterr().err
        and not (tmp_path / "out").exists()
    )


def test_two_nodes_of_one_host_with_more_ranks_than_batches(whole, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "2",
    ]
    common += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    program = ["evaluate.py", str(whole / "last.pt"), "--json", str(tmp_path / "metrics.json")]
    nodes = [
        subprocess.Popen(
            [*common, "--node-rank", str(node), *program], cwd=ROOT, stderr=subprocess.PIPE
        )
        for node in range(2)
    ]
    for node in nodes:
        _, errors = node.communicate(timeout=200)
        assert node.returncode == 0, errors
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(
        (whole / "metrics.json").read_text()
    )
