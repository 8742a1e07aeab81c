"""The peers of the bench do the same work as ours, so that its ratios compare like with like."""

from functools import partial

import pytest
import torch
from conftest import fails, read_json, succeeds

import evaluate
import runtime
import train
from extras import bench
from losses import GraFTLoss
from model import GraFT, GraFTConfig

pytest.importorskip("timm")
SIZES = dict(image_size=(32, 64), dim=32, depth=2, heads=2, encoder_heads=2, encoder_hidden=64)
TINY = GraFTConfig(num_ids=5, **SIZES)


@pytest.mark.parametrize("stage", bench.PAPER.stages)
def test_the_published_step_has_our_loss_and_gradients(stage):
    torch.manual_seed(0)
    model = GraFT(TINY)
    images, labels = bench.random_triplets(TINY, 2, "cpu")
    losses, gradients = [], []
    for side in (model, bench.PublishedGraFT(model)):
        side.freeze_backbone(stage.frozen)
        criterion = GraFTLoss(TINY.num_ids, TINY.dim)
        criterion.set_weights(0.5, stage.beta, 0.5, stage.label_smoothing)
        embedder = evaluate.Embedder(side, bench.HALF, bench.HALF, torch.device("cpu"), "fp32")
        loss = train.Objective(embedder, criterion).eval()(images, labels)["loss"]
        loss.backward()
        losses.append(loss.item())
        named = side.named_parameters()
        gradients.append({n.replace(".vit.", "."): p.grad for n, p in named if p.requires_grad})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=0)


def test_triplets_vanish_to_where_gradients_are_denormal():
    value = bench.vanish(GraFT(TINY), *bench.random_triplets(TINY, 4, "cpu"))
    assert 0 < value < 2e-35
    assert not (torch.full((4,), 1e-30) * 1e-10).any()  # and such numbers are flushed


def test_the_published_reading_gives_the_same_pixels(tmp_path):
    split = bench.mosaics(3, tmp_path)
    for modality, images in bench.published_reading(split, [0, 1, 2]).items():
        ours = torch.stack([split[i][0][modality] for i in range(3)])
        assert (images.int() - ours).abs().max() <= 2


def test_every_row_is_measured_and_written(tmp_path, monkeypatch):
    """At a tiny size; the ranking and reading rows compare their sides' figures themselves."""
    monkeypatch.setattr(bench, "matrix_rate", lambda *_: 1e9)
    monkeypatch.setattr(bench, "DEIT_B", TINY)
    monkeypatch.setattr(bench, "SMALL", TINY)
    small = {"rank": partial(bench.rank_rows, sizes=(40, 200, 10, 3))}
    small["reading"] = partial(bench.reading_rows, count=4)
    for name, rows in small.items():
        monkeypatch.setitem(bench.ROWS, name, rows)
    succeeds(bench, "--turns", 1, "--json", tmp_path / "bench.json")
    report = read_json(tmp_path / "bench.json")
    assert report["machine"].startswith(runtime.machine(torch.device("cpu")))
    assert report["rates"].keys() == {"bf16", "fp32"}
    assert len(report["rows"]) == 11
    for row in report["rows"]:
        assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"])


def test_mistakes():
    assert "no row step3" in fails(bench, "--rows", "step3")
    assert "--gpu: the device is cpu" in fails(bench, "--gpu", "--device", "cpu")
