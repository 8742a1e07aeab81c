"""Each slip of the published code does what it says, and is gone afterwards."""

import numpy as np
import pytest
import torch
from conftest import fails, read_json, succeeds, tiny_arguments

import data
import losses
import model
import train
from experiments import published
from experiments.tables import CHOICES


def slip(name: str, *options):
    """What is patched while training by these options, which give it an effect."""
    return published.slipped(name, train.parse([*options]))


def test_gradients_add_up_over_the_steps_of_a_stage(tmp_path):
    weight = torch.nn.Parameter(torch.zeros(1))
    objective = torch.nn.Module()
    objective.model, objective.criterion = torch.nn.Module(), losses.GraFTLoss(2, 2)
    objective.model.backbones, objective.weight = [], weight
    stage = train.parse([]).stages[1]
    weight.grad = torch.ones(1)  # of an earlier stage
    with slip("unzeroed", "--out", str(tmp_path)):
        optimizer = train.make_optimizer(objective, stage, 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            weight.sum().backward()
        assert weight.grad == 2
    train.make_optimizer(objective, stage, 0.1).zero_grad()
    assert weight.grad is None


def test_other_sensors_of_positives_and_negatives_are_rgb(monkeypatch):
    monkeypatch.setattr(train.Batches, "prepare", lambda self, images, draws: images)
    images = {"rgb": torch.arange(6), "nir": torch.arange(10, 16)}
    with slip("rgb-files"):
        mixed = train.Batches.prepare(None, images, None)
    assert mixed["rgb"].tolist() == [0, 1, 2, 3, 4, 5]
    assert mixed["nir"].tolist() == [10, 11, 2, 3, 4, 5]


def test_two_positives_an_identity_and_four_negatives_in_all():
    pids = torch.arange(60) // 6
    sampler = data.TripletSampler(pids, 20, 1, 0)
    with slip("few-partners"):
        steps = [sampler.steps(epoch).transpose(1, 0, 2).reshape(3, -1) for epoch in range(9)]
    triplets = np.concatenate(steps, 1)
    anchor, positive, negative = pids.numpy()[triplets]
    assert (anchor == positive).all()
    assert (anchor != negative).all()
    assert (triplets[0] != triplets[1]).all()
    assert [len(set(role)) for role in triplets] == [60, 2 * 10, 4]
    _, counts = np.unique(triplets[2], return_counts=True)
    assert 0.7 < counts.max() / counts.sum() < 0.87  # 85%, but for its own identity


def test_triplets_of_one_anchor_an_identity_and_camera(tiny_data):
    args = train.parse(["--data-root", str(tiny_data), "--batch-size", "4"])
    dataset = data.load_dataset("synthetic", tiny_data, None, (32, 64))
    whole = train.make_sampler(args, dataset).steps(0)
    with slip("few-anchors"):
        steps = train.make_sampler(args, dataset).steps(0)
    assert steps.shape == whole.shape
    triplets = steps.transpose(0, 2, 1).reshape(-1, 3)
    places = list(zip(dataset.train.pids.tolist(), dataset.train.keys.tolist(), strict=True))
    firsts = {places.index(place) for place in places}
    assert set(triplets[:, 0]) == firsts
    assert len(firsts) < len(places)
    known = {tuple(row) for row in whole.transpose(0, 2, 1).reshape(-1, 3)}
    assert {tuple(row) for row in triplets} <= known  # so no anchor is its own positive


def test_each_sensor_is_erased_at_a_place_of_its_own():
    image = torch.arange(1, 97, dtype=torch.uint8).view(1, 1, 8, 12).expand(64, 3, -1, -1)
    images = {"rgb": image, "nir": image}
    draws = torch.rand(64, 9, generator=torch.Generator().manual_seed(0))
    together = data.augment(images, draws, (0.5, 0.0), 0.5)
    with slip("erase-apart", "--erase", "0.5"):
        apart = data.augment(images, draws, (0.5, 0.0), 0.5)
    assert torch.equal(apart["rgb"], together["rgb"])
    hidden = {name: image == 0 for name, image in apart.items()}
    assert (hidden["rgb"] != hidden["nir"]).any()
    seen = ~(hidden["rgb"] | hidden["nir"])
    assert torch.equal(apart["rgb"][seen], apart["nir"][seen])  # mirrored alike
    assert 0.3 < hidden["nir"].flatten(1).any(1).float().mean() < 0.7


def test_the_center_loss_is_the_mean_norm_as_printed():
    center = losses.CenterLoss(2, 2)
    features, labels = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([0, 1])
    with slip("center-norm"):
        assert center(features, labels) == 3.5
    assert center(features, labels) == 14.5


def test_centroids_are_drawn_and_the_fusion_token_starts_narrower():
    args = train.parse([])
    with published.slipped("random-centroids", args):
        center = losses.CenterLoss(50, 64)
        center.start_at_means(torch.zeros(1, 64), torch.zeros(1, dtype=torch.long))
    assert center.centers.std().item() == pytest.approx(1, abs=0.05)
    assert args.center_lr == 0
    config = model.GraFTConfig(depth=1, image_size=(16, 16))
    with slip("narrow-token"):
        narrow = model.GraFT(config).fusion_token
    for token, bound in ((narrow, 0.0625), (model.GraFT(config).fusion_token, 0.0883)):
        assert bound - 0.001 < token.abs().max() <= bound + 1e-4


def test_a_run_with_a_slip_is_continued_only_with_it(tiny_data, tmp_path):
    out = tmp_path / "run"
    arguments = [*tiny_arguments(tiny_data, out), "--epochs", 1, 0, "--epoch-steps", 1]
    succeeds(published, "rgb-files", *arguments)
    assert read_json(out / "config.json")["slip"] == "rgb-files"
    assert "trained with another slip" in fails(train, *arguments, "--resume")
    assert "rgb: no such slip; expected one of unzeroed" in fails(published, "rgb", *arguments)
    assert "change nothing; expected a new --out" in fails(published, "unzeroed", *arguments)
    plus = fails(published, "few-anchors", *arguments, "--recipe", "plus")
    assert "change nothing; expected --triplet of tokens" in plus


def test_every_slip_is_a_row_of_the_table_of_choices():
    assert {row.slip for row in CHOICES} - {""} == set(published.SLIPS)
