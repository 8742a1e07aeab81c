"""The peers of the bench do the same work as ours, so that its ratios compare like with like."""

import pytest
import torch
from conftest import fails, read_json, succeeds

import evaluate
import runtime
import train
from extras import bench
from losses import GraFTLoss
from model import GraFT, GraFTConfig

SIZES = dict(image_size=(32, 64), dim=32, depth=2, heads=2, encoder_heads=2, encoder_hidden=64)
TINY = GraFTConfig(num_ids=5, **SIZES)


@pytest.mark.parametrize("stage", bench.PAPER.stages)
def test_the_published_step_has_our_loss_and_gradients(stage):
    torch.manual_seed(0)
    model = GraFT(TINY)
    peer = bench.PublishedStep(model, stage).eval()
    model.eval().freeze_backbone(stage.frozen)
    criterion = GraFTLoss(TINY.num_ids, TINY.dim)
    criterion.weights(0.5, stage.beta, 0.5, stage.label_smoothing)
    embedder = evaluate.Embedder(model, bench.HALF, bench.HALF, torch.device("cpu"), "fp32")
    images, labels = bench.random_triplets(TINY, 2, "cpu")
    losses = [
        side(images, labels)["loss"] for side in (train.Objective(embedder, criterion).eval(), peer)
    ]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    theirs = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-5, rtol=0)
        else:
            assert theirs[name].grad is None, name


def test_triplets_vanish_to_where_gradients_are_denormal():
    model = GraFT(TINY)
    value = bench.vanish(model, *bench.random_triplets(TINY, 4, "cpu"))
    assert 0 < value < 2e-35
    assert not (torch.full((4,), 1e-30) * 1e-10).any()  # and such numbers are flushed


def test_the_published_evaluation_ranks_as_we_do():
    torch.manual_seed(0)
    query, gallery, pids, keys = bench.features(40, 200, 10, 3, width=16)
    expected = evaluate.rank_metrics(query, gallery, *pids, *keys).mAP
    found = bench.published_evaluation(query, gallery, pids, keys)
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_published_reading_gives_the_same_pixels(tmp_path):
    split = bench.mosaics(3, tmp_path)
    for modality, images in bench.published_reading(split, [0, 1, 2]).items():
        ours = torch.stack([split[i][0][modality] for i in range(3)])
        assert (images.int() - ours).abs().max() <= 2


def test_the_report_names_the_processor_and_both_rates(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "matrix_rate", lambda *_: 1e9)
    text = succeeds(bench, "--rows", "ffd", "--turns", 1, "--json", tmp_path / "bench.json")
    report = read_json(tmp_path / "bench.json")
    (row,) = report["rows"]
    assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"])
    assert row["machine"].startswith(runtime.machine(torch.device("cpu")))
    assert f"; {row['machine']}\n" in text
    assert report["rates"].keys() == {"bf16", "fp32"}


def test_mistakes():
    assert "no row step3" in fails(bench, "--rows", "step3")
    assert "--gpu: the device is cpu" in fails(bench, "--gpu", "--device", "cpu")
