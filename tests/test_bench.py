"""Proves that the peers of bench.py do the same work as ours, so that ratios compare like with like, and that it reports."""

import json

import pytest
import torch
from conftest import run

import evaluate
import train
from extras import bench
from losses import GraFTLoss
from model import GraFT, GraFTConfig

TINY = GraFTConfig(num_ids=5, image_size=(32, 64), dim=32, depth=2, heads=2, encoder_heads=2, encoder_hidden=64)


@pytest.mark.parametrize("number", [1, 2])
def test_published_step_has_our_loss_and_gradients(number):
    torch.manual_seed(0)
    stage, model = train.PAPER.stages[number - 1], GraFT(TINY)
    peer = bench.PublishedStep(model, stage).eval()
    model.eval().freeze_backbone(stage.frozen)
    criterion = GraFTLoss(TINY.num_ids, TINY.dim)
    criterion.weights(0.5, stage.beta, 0.5, stage.label_smoothing)
    step = train.TrainingStep(model, criterion, torch.device("cpu"), "fp32").eval()
    images, labels = {modality: torch.randn(6, 3, 32, 64) for modality in TINY.modalities}, torch.tensor([1, 3])
    losses = [side(images, labels)["loss"] for side in (step, peer)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    theirs = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, theirs[name].grad, atol=1e-5), name
        else:
            assert theirs[name].grad is None, name


def test_loop_ranks_as_we_do():
    torch.manual_seed(0)
    query, gallery, pids, keys = bench.features(40, 200, 10, 3, width=16)
    assert bench.loop_mean_ap(query, gallery, pids, keys) == pytest.approx(
        evaluate.rank_metrics(query, gallery, *pids, *keys).mAP, abs=1e-6
    )


def test_published_reader_reads_the_same_pixels(tmp_path):
    split = bench.mosaics(3, tmp_path)
    theirs = bench.PublishedReader(split)
    for i in range(3):
        for modality, image in split[i][0].items():
            assert (image.int() - theirs[i][0][modality]).abs().max() <= 2


def test_report(tmp_path):
    result = run("-m", "extras.bench", "--rows", "triplets,index", "--json", tmp_path / "bench.json", "--repeats", 1)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["asked"] for row in rows] == [0.3, 1.0] and all(row["reached"] > 0 and row["most"] for row in rows)
    assert "triplet list of 25,200 images" in result.stdout


def test_unknown_row():
    result = run("-m", "extras.bench", "--rows", "step3")
    assert result.returncode == 2 and "no row step3" in result.stderr
