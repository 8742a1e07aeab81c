"""The peers of the bench do the same work as ours, so that its ratios compare like with like."""

import json

import pytest
import torch
from conftest import call

import evaluate
import train
from extras import bench
from losses import GraFTLoss
from model import GraFT, GraFTConfig

TINY = GraFTConfig(
    num_ids=5, image_size=(32, 64), dim=32, depth=2, heads=2, encoder_heads=2, encoder_hidden=64
)


@pytest.mark.parametrize("stage", bench.PAPER.stages)
def test_published_step_has_our_loss_and_gradients(stage):
    torch.manual_seed(0)
    model = GraFT(TINY)
    peer = bench.PublishedStep(model, stage).eval()
    model.eval().freeze_backbone(stage.frozen)
    criterion = GraFTLoss(TINY.num_ids, TINY.dim)
    criterion.weights(0.5, stage.beta, 0.5, stage.label_smoothing)
    embedder = evaluate.Embedder(model, bench.HALF, bench.HALF, torch.device("cpu"), "fp32")
    objective = train.Objective(embedder, criterion).eval()
    images = {modality: torch.randn(6, 3, 32, 64) for modality in TINY.modalities}
    labels = torch.tensor([1, 3])
    losses = [side(images, labels)["loss"] for side in (objective, peer)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    theirs = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, theirs[name].grad, atol=1e-5), name
        else:
            assert theirs[name].grad is None, name


def test_the_published_evaluation_ranks_as_we_do():
    torch.manual_seed(0)
    query, gallery, pids, keys = bench.features(40, 200, 10, 3, width=16)
    expected = evaluate.rank_metrics(query, gallery, *pids, *keys).mAP
    found = bench.published_evaluation(query, gallery, pids, keys)
    assert found == pytest.approx(expected, abs=1e-6)


def test_published_reader_reads_the_same_pixels(tmp_path):
    split = bench.mosaics(3, tmp_path)
    theirs = bench.PublishedReader(split)
    for i in range(3):
        for modality, image in split[i][0].items():
            assert (image.int() - theirs[i][0][modality]).abs().max() <= 2


def test_report(tmp_path):
    done = call(bench, "--rows", "pruned", "--turns", 1, "--json", tmp_path / "bench.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    (row,) = report["rows"]
    assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"]) and row["peer"] == "all of it"
    assert "embedding by half of the small model" in done.stdout and report["rates"]["bf16"] > 0


def test_mistakes():
    done = call(bench, "--rows", "step3")
    assert done.returncode == 2 and "no row step3" in done.stderr
    done = call(bench, "--gpu", "--device", "cpu")
    assert done.returncode == 2 and "--gpu: the device is cpu" in done.stderr
