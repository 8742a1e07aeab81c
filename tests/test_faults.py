"""What goes wrong on shared machines and in strangers' files.

Runs continue to the bit, or end with one line and lose nothing.
"""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    call,
    fails,
    free_port,
    read_json,
    read_log,
    succeeds,
    tiny_arguments,
    torchrun,
)
from PIL import Image

import data
import evaluate
import prune
import runtime
import train
from model import GraFTConfig, build_model


def arguments(tiny_data, out, *more) -> list:
    """A short run of both stages: 2 epochs of 8 steps, and 1."""
    return [*tiny_arguments(tiny_data, out), "--epochs", 2, 1, *more]


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory):
    """A run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole")
    succeeds(train, *arguments(tiny_data, out))
    return out


def outcome(out: Path) -> dict:
    """All that a run leaves, times and paths aside: tensors and figures by name."""
    checkpoint, varying = runtime.load_checkpoint(out), {"seconds", "triplets_per_second"}
    lines = [line for line in read_log(out) if line["event"] != "start"]
    lines = [{name: v for name, v in line.items() if name not in varying} for line in lines]
    left = {"metrics": read_json(out / "metrics.json"), "log": lines}
    for part in ("model", "criterion"):
        left |= {f"{part} {name}": value for name, value in checkpoint[part].items()}
    for number, state in checkpoint["optimizer"]["state"].items():
        left |= {f"optimizer {number} {name}": value for name, value in state.items()}
    return left


def assert_same_outcome(out: Path, other: Path) -> None:
    a, b = outcome(out), outcome(other)
    assert a.keys() == b.keys()
    for name, value in a.items():
        same = torch.equal(value, b[name]) if torch.is_tensor(value) else value == b[name]
        assert same, name


# --- killed, stopped, restarted


def altered(change) -> SimpleNamespace:
    """train.py, after `change()` has patched it in its own process."""

    def main() -> None:
        change()
        train.main()

    return SimpleNamespace(__name__="train", main=main)


def killed(n: int) -> SimpleNamespace:
    """train.py, killed while it writes its n-th checkpoint."""
    save, calls = torch.save, []

    def half(checkpoint, path):
        save(checkpoint, path)
        calls.append(path)
        if len(calls) == n:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    return altered(lambda: setattr(torch, "save", half))


def test_killed_while_writing_a_checkpoint_and_resumed(tiny_data, whole, tmp_path):
    assert call(killed(2), *arguments(tiny_data, tmp_path)).returncode == -signal.SIGKILL
    succeeds(train, "--resume", "--out", tmp_path)
    assert_same_outcome(whole, tmp_path)
    assert not list(tmp_path.glob(".*.tmp"))  # what was half-written is gone


def signalled(step: int, number: int) -> SimpleNamespace:
    """train.py, whose last rank gets a signal in its n-th step."""
    mean_over_ranks, calls = train.mean_over_ranks, []

    def at_step(sums, optimizer):
        calls.append(sums)
        if len(calls) == step and runtime.rank() == runtime.world_size() - 1:
            signal.raise_signal(number)
        return mean_over_ranks(sums, optimizer)

    return altered(lambda: setattr(train, "mean_over_ranks", at_step))


@pytest.mark.parametrize(("number", "step", "place"), [
    (signal.SIGTERM, 13, "stage 1, epoch 2, step 5 of 8"),
    (signal.SIGINT, 24, "stage 2, epoch 1, step 8 of 8"),
])  # fmt: skip
def test_a_signal_finishes_the_step_and_saves(tiny_data, whole, tmp_path, number, step, place):
    done = call(signalled(step, number), *arguments(tiny_data, tmp_path))
    assert done.returncode == 128 + number
    assert f"stopped after {place}: continue with --resume" in done.stderr
    assert runtime.load_checkpoint(tmp_path)["progress"]["step"] == (step - 1) % 8 + 1
    succeeds(train, *arguments(tiny_data, tmp_path), "--resume")
    assert_same_outcome(whole, tmp_path)


def test_a_signal_to_the_whole_group_saves_though_processes_read(tiny_data, tmp_path):
    """As Slurm sends it: to the main process and to its readers at once."""
    words = [*tiny_arguments(tiny_data, tmp_path), "--store", 0, "--workers", 2, "--epochs", 99]
    program = subprocess.Popen(
        [sys.executable, "train.py", *map(str, words)],
        cwd=ROOT, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while not (tmp_path / "last.pt").exists():
        time.sleep(0.1)
        assert program.poll() is None, program.communicate()
    os.killpg(program.pid, signal.SIGTERM)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == 143, errors
    assert "continue with --resume" in errors
    assert len(errors.splitlines()) == 1, errors


RESTARTED = """
import os, sys, train
passes = train.Batches.passes
def deadly(self, batches, key):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if key[1:] == (2, 0, 4) and os.environ["RANK"] == "1" and first:
        os.kill(os.getpid(), 9)
    return passes(self, batches, key)
train.Batches.passes = deadly
train.main()
"""


def test_torchrun_restarts_a_killed_rank_from_the_last_checkpoint(tiny_data, tmp_path):
    """With --resume, which also starts the run."""
    short = ["--epochs", 1, 1, "--epoch-steps", 6]
    succeeds(train, *tiny_arguments(tiny_data, tmp_path / "whole"), *short, ranks=2)
    program = ["--max-restarts", 1, "--no-python", sys.executable, "-c", RESTARTED]
    options = [*tiny_arguments(tiny_data, tmp_path / "killed"), *short, "--resume"]
    done = torchrun(2, *program, *options)
    assert done.returncode == 0, done.stderr
    assert_same_outcome(tmp_path / "whole", tmp_path / "killed")


# --- ending with a line


def test_a_loss_that_is_not_finite_stops_before_the_weights(tiny_data, tmp_path):
    """On one of two ranks, after an epoch that was saved."""
    forward, calls = train.Objective.forward, []

    def diverged(self, *given):
        calls.append(given)
        scale = float("nan") if runtime.rank() == 1 and len(calls) == 13 else 1.0
        return {name: value * scale for name, value in forward(self, *given).items()}

    diverging = altered(lambda: setattr(train.Objective, "forward", diverged))
    done = call(diverging, *arguments(tiny_data, tmp_path), ranks=2)
    assert done.returncode == 2
    assert "stage 1, epoch 2, step 5: loss or gradient is not finite" in done.stderr
    checkpoint = runtime.load_checkpoint(tmp_path)
    assert checkpoint["progress"]["epoch"] == 1
    assert all(weight.isfinite().all() for weight in checkpoint["model"].values())
    record = read_log(tmp_path)[-1]
    assert record["event"] == "not finite"
    assert len(record["batch"]) == 24  # the samples of both ranks


def test_a_full_disk_leaves_the_checkpoint_before(tiny_data, tmp_path):
    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    short = ["--epochs", 1, "--epoch-steps", 1]
    call(killed(2), *tiny_arguments(tiny_data, tmp_path), *short)
    before = (tmp_path / "last.pt").read_bytes()
    line = fails(altered(fill), "--out", tmp_path, "--resume")
    assert "last.pt: cannot be written" in line
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_folder_that_cannot_be_synced_is_written_all_the_same(tmp_path, monkeypatch):
    """CIFS, vboxsf, Windows."""
    fsync = os.fsync

    def picky(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(22, "Invalid argument")
        return fsync(descriptor)

    monkeypatch.setattr(os, "fsync", picky)
    runtime.write_json(tmp_path / "a.json", {"a": 1})
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_two_nodes_of_one_host(trained, tmp_path):
    words = "-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --master-addr 127.0.0.1"
    words += f" --master-port {free_port()} --node-rank"
    program = ["evaluate.py", trained, "--json", tmp_path / "metrics.json"]
    nodes = [
        subprocess.Popen(
            [sys.executable, *words.split(), n, *program], cwd=ROOT, stderr=subprocess.PIPE
        )
        for n in "01"
    ]
    for node in nodes:
        _, errors = node.communicate(timeout=200)
        assert node.returncode == 0, errors
    found, expected = (read_json(p / "metrics.json") for p in (tmp_path, trained))
    assert found["mAP"] == expected["mAP"]


@pytest.mark.parametrize("modalities", [("depth",), ("a", "b", "c", "d", "e", "f")])
def test_one_modality_or_six_in_a_folder_with_an_odd_name(tmp_path, modalities):
    root, draw = tmp_path / "Fotos für Ä 写真", np.random.default_rng(0)
    for split, first in (("train", 1), ("query", 101), ("gallery", 101)):
        for modality in modalities:
            (root / split / modality).mkdir(parents=True)
            for i in range(12):
                name = f"{first + i // 4}_c{i % 2 + 1}_{i}.png"
                pixels = draw.integers(0, 256, (16, 32, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / modality / name)
    out = tmp_path / "out put" / "é"
    words = "--dataset folder --backbone small --backbone-weights none --image-size 16 32"
    words += " --epochs 1 --positives 1 --batch-size 5 --precision fp32 --epoch-steps 1"
    succeeds(train, *words.split(), "--data-root", root, "--out", out)
    assert read_json(out / "metrics.json")["num_query"] == 12
    assert evaluate.load_model(out)[0].config.modalities == modalities


# --- damaged and hostile files


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """A small checkpoint as train.py writes it, one as prune.py does, and two images."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    size = dict(image_size=(32, 32), dim=32, depth=2, heads=2, encoder_heads=2, encoder_hidden=32)
    model = build_model(GraFTConfig(**size, num_ids=5))
    half = dict.fromkeys(model.config.modalities, (0.5, 0.5, 0.5))
    about = {"config": vars(model.config), "settings": {"seed": 0}, "mean": half, "std": half}
    runtime.save_checkpoint(folder / "whole.pt", {**about, "model": model.state_dict()})
    prune.mask(model, 10_000)
    prune.make_permanent(model)
    prune.write(folder / "pruned.pt", model, about)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 48, 3), np.uint8).repeat(8, 0)
    for suffix in ("jpg", "png"):
        Image.fromarray(pixels).save(folder / f"photo.{suffix}")
    return sorted(folder.iterdir())


def damage(content: bytes, draw: random.Random) -> bytes:
    """The same bytes cut off, with bits flipped, blocks swapped or zeroed, or a block repeated."""
    size, kind, result = len(content), draw.randrange(5), bytearray(content)
    a, b = sorted(draw.sample(range(size), 2))
    n = draw.randint(1, max(1, min(b - a, size - b, 4096)))
    if kind == 0:
        return content[:a]
    if kind == 1:
        for _ in range(draw.randint(1, 20)):
            result[draw.randrange(size)] ^= 1 << draw.randrange(8)
    elif kind == 2:
        result[a : a + n], result[b : b + n] = content[b : b + n], content[a : a + n]
    elif kind == 3:
        result[a : a + n] = bytes(n)
    else:
        result[a:a] = content[b : b + n]
    return bytes(result)


def read(path: Path) -> dict:
    if path.suffix == ".pt":
        return evaluate.load_model(path)[0].state_dict()
    return {"size": torch.tensor(data.read_image(path).size)}


def test_damaged_files_are_refused_in_one_line_or_read_right(files, tmp_path):
    for i in range(120):
        draw, source = random.Random(i), files[i % len(files)]
        path, expected = tmp_path / f"damaged{source.suffix}", read(source)
        path.write_bytes(damage(source.read_bytes(), draw))
        try:
            found = read(path)
        except runtime.UserError as error:
            assert path.name in str(error), i
            assert "\n" not in str(error), i
        else:
            assert found.keys() == expected.keys(), i
            assert all(torch.equal(found[name], expected[name]) for name in found), i


@pytest.mark.parametrize(
    "change",
    [
        {"dim": 10**9}, {"depth": 10**9}, {"modalities": ("rgb",) * 10**4}, {"num_ids": 2**30},
        {"image_size": (2**19, 2**19)}, {"encoder_hidden": 2**30}, {"heads": 0}, {"dim": "32"},
        {"blocks": ((1, 2**40),)}, {"fusion": "other"}, {"backbone": "timm:none_of_timms"},
    ],
)  # fmt: skip
def test_sizes_in_a_checkpoint_are_checked_before_memory_is_taken(files, tmp_path, change):
    (source,) = (path for path in files if path.name == "whole.pt")
    checkpoint = torch.load(source)
    path = tmp_path / "changed.pt"
    torch.save({**checkpoint, "config": {**checkpoint["config"], **change}}, path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(runtime.UserError):
        evaluate.load_model(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # kB


def test_a_pickle_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    assert "not a checkpoint that torch can read safely" in fails(evaluate, tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
