"""Two processes (gloo) with half the batch each do what one does with the whole."""

import json
import os
import socket
import time

import pytest
import torch
from conftest import run, tiny_arguments, torchrun
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

import runtime
from losses import GraFTLoss
from model import GraFTConfig, SyncBatchNorm1d, build_model
from train import TrainingStep

B = 8  # triplets in all


def make_step() -> TrainingStep:
    torch.manual_seed(0)
    size = dict(image_size=(16, 32), dim=32, depth=2, heads=2, encoder_heads=4, encoder_hidden=48, num_ids=5, dropout=0.0)
    step = TrainingStep(build_model(GraFTConfig(**size)), GraFTLoss(5, 32), torch.device("cpu"), "fp32")
    step.criterion.weights(alpha=0.5, beta=0.0005, gamma=0.5, label_smoothing=0.1)
    torch.nn.init.normal_(step.model.classifier.weight)  # so that gradients through BatchNorm count
    return step


def make_batch(first: int, last: int):
    """Triplets first .. last - 1 of a fixed batch: anchors, positives, negatives."""
    generator = torch.Generator().manual_seed(1)
    images = {m: torch.randn(3, B, 3, 16, 32, generator=generator)[:, first:last].flatten(0, 1) for m in ("rgb", "nir", "tir")}
    return images, (torch.arange(B) % 5)[first:last]


def gradients(step: TrainingStep) -> dict:
    return {name: p.grad for name, p in step.named_parameters() if p.grad is not None}


def worker(rank: int, world: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    runtime.start("cpu")
    step = make_step()
    part = B // world
    parallel = DistributedDataParallel(step)  # kept: gradients are averaged while it lives
    losses = parallel(*make_batch(rank * part, (rank + 1) * part))
    losses["loss"].backward()
    norm = SyncBatchNorm1d(4)
    torch.manual_seed(rank)
    x = torch.randn(3 + rank, 4)  # unequal parts
    norm(x)
    result = {"gradients": gradients(step), "loss": runtime.all_sum(losses["loss"].detach()) / world}
    result |= {"mean": norm.running_mean, "var": norm.running_var}
    torch.save(result, f"{folder}/{rank}.pt")
    runtime.stop()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = spawn(worker, (2, port, str(folder)), nprocs=2, join=False)
    end = time.monotonic() + 100
    while not ranks.join(timeout=5):
        if time.monotonic() > end:
            for process in ranks.processes:
                process.kill()
            pytest.fail("the two ranks wait for each other")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_same_loss_and_gradients_as_one_process(two):
    step = make_step()
    loss = step(*make_batch(0, B))["loss"]
    loss.backward()
    expected = gradients(step)
    assert len(expected) == len(list(step.parameters())) - 1  # all but BatchNorm's frozen bias
    for rank in two:
        torch.testing.assert_close(rank["loss"], loss.detach(), atol=1e-5, rtol=0)
        for name, gradient in expected.items():
            torch.testing.assert_close(rank["gradients"][name], gradient, atol=1e-5, rtol=1e-5, msg=name)


def test_batchnorm_of_unequal_parts_is_that_of_the_whole(two):
    parts = []
    for rank in range(2):
        torch.manual_seed(rank)
        parts.append(torch.randn(3 + rank, 4))
    reference = torch.nn.BatchNorm1d(4)
    reference(torch.cat(parts))
    for rank in two:
        torch.testing.assert_close(rank["mean"], reference.running_mean)
        torch.testing.assert_close(rank["var"], reference.running_var)


def test_torchrun_trains_and_evaluates_as_one_process(tiny_data, tmp_path):
    """Half the batch on each of two ranks, dropout 0: the weights of one process with the whole batch; the same figures."""
    common = ["--dropout", 0, "--epochs", 1, 1, "--modality-dropout", 0.3, "--epoch-steps", 3, 3]
    one, both = tmp_path / "one", tmp_path / "two"
    done = run("train.py", *tiny_arguments(tiny_data, one), *common)
    assert done.returncode == 0, done.stderr
    done = torchrun(2, "train.py", *tiny_arguments(tiny_data, both), *common, "--batch-size", 4)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stage 2 epoch 1/1") == 1  # rank 0 alone speaks
    a, b = ([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (one, both))
    for epoch in (1, 2):
        for name in ("loss", "triplet", "center", "cross_entropy", "lr"):
            assert b[epoch][name] == pytest.approx(a[epoch][name], rel=1e-4), (epoch, name)
    a, b = (runtime.load_checkpoint(folder / "last.pt")["model"] for folder in (one, both))
    for name in a:  # the mean: where a gradient is nearly zero, AdamW makes much of its rounding
        assert (b[name] - a[name]).abs().float().mean() < 2e-4, name
    done = torchrun(2, "evaluate.py", both / "last.pt", "--json", tmp_path / "two.json")
    assert done.returncode == 0, done.stderr
    assert run("evaluate.py", both / "last.pt", "--json", tmp_path / "one.json").returncode == 0
    figures = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")]
    assert figures[0] == pytest.approx(figures[1], abs=1e-4)


def test_a_mistake_under_torchrun_ends_all_ranks(tiny_data, tmp_path):
    done = torchrun(2, "train.py", *tiny_arguments(tiny_data, tmp_path / "out"), "--batch-size", 60)
    assert done.returncode != 0 and "batch of 60 triplets on 2 ranks" in done.stderr
    assert not (tmp_path / "out").exists()
