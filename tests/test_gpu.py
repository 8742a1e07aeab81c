"""What only a CUDA GPU shows: GPU=1 python -m pytest tests/test_gpu.py -n 8 --dist load

The other tests hide the GPUs: they fork, which CUDA does not survive, and start more ranks than a
machine may have GPUs.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, read_log, run, tiny_arguments, torchrun
from test_faults import assert_same_outcome
from test_machine import forward, make_run

import evaluate
import runtime
import train
from model import FUSIONS, GraFTConfig, build_model

pytestmark = pytest.mark.skipif(
    not (os.environ.get("GPU") == "1" and torch.cuda.is_available()), reason="needs a GPU, GPU=1"
)
MODALITIES = ("rgb", "nir", "tir")
HALF = dict.fromkeys(MODALITIES, (0.5, 0.5, 0.5))


def arguments(data, out, *more) -> list[str]:
    """A run of 16 frozen and 8 unfrozen steps; dropout draws on the GPU."""
    options = ["--epochs", 2, 1, "--device", "cuda", "--deterministic"]
    return [str(word) for word in (*tiny_arguments(data, out), *options, *more)]


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory):
    """Runs that nothing disturbs, by precision."""
    outs = {}
    for precision in ("fp32", "bf16"):
        outs[precision] = tmp_path_factory.mktemp(precision)
        done = run("train.py", *arguments(tiny_data, outs[precision], "--precision", precision))
        assert done.returncode == 0, done.stderr
    return outs


@pytest.mark.parametrize("recipe", ["paper", "plus"])
def test_a_step_does_not_synchronise(recipe, tmp_path):
    run, objective = make_run(recipe, torch.device("cuda:0"), tmp_path)
    optimizer = train.make_optimizer(objective, run.args.stages[1], 1e-3)
    for mode in ("default", "error"):  # the first step allocates
        torch.cuda.set_sync_debug_mode(mode)
        try:
            forward(run, objective)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("fusion", FUSIONS)
def test_embeddings_are_those_of_the_cpu(fusion):
    size = {"dim": 96, "depth": 3, "heads": 3}
    if fusion == "hamnet":
        size = {"backbone": "resnet18"}
    model = build_model(GraFTConfig(image_size=(64, 128), fusion=fusion, **size)).eval()
    images = {name: torch.randn(6, 3, 64, 128) for name in MODALITIES}
    found = []
    for device in map(torch.device, ("cpu", "cuda:0")):
        embedder = evaluate.Embedder(model, HALF, HALF, device, "fp32")
        with torch.no_grad():
            found.append(embedder.features_of(runtime.to_device(images, device)).double().cpu())
    assert (found[0] - found[1]).norm() < 2e-3 * found[0].norm()  # TF32


def test_training_goes_as_on_the_cpu(tiny_data, tmp_path):
    without_dropout = 'import options; options.CONSTANTS["dropout"] = 0; import train; train.main()'
    curves = []
    for device in ("cuda", "cpu"):
        out = tmp_path / device
        done = run("-c", without_dropout, *arguments(tiny_data, out, "--device", device))
        assert done.returncode == 0, done.stderr
        curves.append([line["loss"] for line in read_log(out, "step")])
    assert len(curves[0]) == 24
    assert torch.allclose(*map(torch.tensor, curves), rtol=0.03)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopped_and_resumed_it_ends_as_if_nothing_had_been(tiny_data, whole, tmp_path, precision):
    words = arguments(tiny_data, tmp_path, "--precision", precision)
    child = subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT)
    try:
        while not (tmp_path / "last.pt").exists():
            assert child.poll() is None
            time.sleep(0.005)
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 143
    finally:
        child.kill()
    done = run("train.py", "--out", tmp_path, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_outcome(whole[precision], tmp_path)


def test_ranks_by_nccl_end_alike(tiny_data, whole, tmp_path):
    """One rank to the bit; two, where there are two GPUs, by their first steps."""
    for ranks in range(1, min(2, torch.cuda.device_count()) + 1):
        out = tmp_path / str(ranks)
        done = torchrun(ranks, "train.py", *arguments(tiny_data, out))
        assert done.returncode == 0, done.stderr
        if ranks == 1:
            assert_same_outcome(whole["fp32"], out)
        else:
            first, other = (read_log(at, "step")[0]["loss"] for at in (whole["fp32"], out))
            assert abs(first - other) < 0.03 * first


def test_more_ranks_than_gpus_are_refused(tiny_data, tmp_path):
    ranks = torch.cuda.device_count() + 1
    done = torchrun(ranks, "train.py", *arguments(tiny_data, tmp_path / "run"))
    assert done.returncode != 0
    assert not (tmp_path / "run").exists()
    assert done.stderr.count("error: torchrun: ") == 1
    assert f"use --nproc_per_node={ranks - 1}, or --device cpu" in done.stderr


def test_a_checkpoint_of_the_gpu_is_evaluated_and_pruned_anywhere(whole, tmp_path):
    path = whole["fp32"] / "last.pt"
    for device in ("cpu", "cuda"):
        done = run("evaluate.py", path, "--device", device)
        assert done.returncode == 0, done.stderr
        pruned = ["--keep", 0.5, "--rounds", 1, "--epoch-steps", 2, "--device", device]
        done = run("prune.py", path, "--out", tmp_path / device, *pruned)
        assert done.returncode == 0, done.stderr
