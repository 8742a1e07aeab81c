"""Each slip of the published code does what it says, and is gone afterwards."""

import numpy as np
import pytest
import torch
from conftest import call, run
from test_ablate import QUICK

import ablate
import data
import losses
import model
import train
from extras import published
from extras.published import slipped
from runtime import UserError


def test_gradients_add_up_over_steps():
    weight = torch.nn.Parameter(torch.zeros(1))
    for slip, expected in (("unzeroed", 2), (None, 1)):
        weight.grad, optimizer = None, torch.optim.AdamW([weight])
        for _ in range(2):
            if slip:
                with slipped(slip):
                    optimizer.zero_grad()
            else:
                optimizer.zero_grad()
            weight.sum().backward()
        assert weight.grad == expected


def test_other_sensors_of_positives_and_negatives_are_rgb(monkeypatch):
    monkeypatch.setattr(train.Run, "prepare", lambda self, images, draws: images)
    images = {"rgb": torch.arange(6), "nir": torch.arange(10, 16)}
    with slipped("rgb-files"):
        mixed = train.Run.prepare(None, images, None)
    assert mixed["rgb"].tolist() == [0, 1, 2, 3, 4, 5]
    assert mixed["nir"].tolist() == [10, 11, 2, 3, 4, 5]


def test_the_same_triplets_in_each_epoch():
    sampler = data.TripletSampler(torch.arange(12) // 3, 4, 1, 0)
    assert not np.array_equal(sampler.steps(1), sampler.steps(2))
    with slipped("same-triplets"):
        assert np.array_equal(sampler.steps(1), sampler.steps(2))


def test_one_anchor_an_identity_and_camera(tiny_data):
    args = train.parse(["--data-root", str(tiny_data), "--batch-size", "4"])
    dataset = data.load_dataset("synthetic", tiny_data, None, (32, 64))
    split, pids = dataset.train, dataset.train.pids.numpy()
    with slipped("few-anchors"):
        sampler = train.make_sampler(args, dataset)
    triplets = sampler.steps(0).transpose(1, 0, 2).reshape(3, -1)
    groups = {
        (p, k): i
        for i, (p, k) in reversed(list(enumerate(zip(pids, split.keys.tolist(), strict=True))))
    }
    assert set(triplets[0]) <= set(groups.values()) and len(groups) < len(pids)
    assert (pids[triplets[0]] == pids[triplets[1]]).all()
    assert (pids[triplets[0]] != pids[triplets[2]]).all()


def test_each_sensor_is_erased_at_a_place_of_its_own():
    images = dict.fromkeys(("rgb", "nir"), torch.arange(1, 97, dtype=torch.uint8).view(1, 1, 8, 12))
    images = {name: image.expand(64, 3, -1, -1) for name, image in images.items()}
    draws = torch.rand(64, 7, generator=torch.Generator().manual_seed(0))
    together = data.augment(images, draws, (0.5, 0.0), 0.5)
    with slipped("erase-apart"):
        apart = data.augment(images, draws, (0.5, 0.0), 0.5)
    assert torch.equal(together["rgb"], together["nir"])
    assert torch.equal(apart["rgb"], together["rgb"])
    hidden = {name: image == 0 for name, image in apart.items()}
    assert (hidden["rgb"] != hidden["nir"]).any()
    seen = ~(hidden["rgb"] | hidden["nir"])
    assert torch.equal(apart["rgb"][seen], apart["nir"][seen])  # mirrored alike
    assert 0.3 < hidden["nir"].flatten(1).any(1).float().mean() < 0.7


def test_centroids_are_drawn_and_the_fusion_token_starts_narrower():
    with slipped("random-centroids"):
        center = losses.CenterLoss(50, 64)
        center.start_at_means(torch.zeros(1, 64), torch.zeros(1, dtype=torch.long))
    assert center.centers.std().item() == pytest.approx(1, abs=0.05)
    config = model.GraFTConfig(depth=1, image_size=(16, 16))
    for slip, bound in (("narrow-token", 0.0625), (None, 0.0883)):
        if slip:
            with slipped(slip):
                token = model.GraFT(config).fusion_token
        else:
            token = model.GraFT(config).fusion_token
        assert bound - 0.001 < token.abs().max() <= bound + 1e-4


def test_a_run_with_a_slip_and_one_of_a_table(tiny_data, tmp_path):
    out = tmp_path / "run"
    arguments = ["--data-root", tiny_data, "--out", out, *QUICK]
    done = call(published, "rgb-files", *arguments)
    assert done.returncode == 0 and (out / "metrics.json").exists(), done.stderr
    done = call(published, "rgb", *arguments)
    assert done.returncode == 2 and "rgb: no such slip; expected one of unzeroed" in done.stderr
    with pytest.raises(UserError), slipped("rgb"):
        pass
    done = run("ablate.py", "--table", "choices", "--seeds", 1, "--dry-run", "--out", tmp_path)
    slips = [line for line in done.stdout.splitlines() if "extras.published" in line]
    assert len(slips) == len(published.SLIPS)
    assert f"--out {tmp_path}/erase-apart-erase-0.5/0" in done.stdout
    assert ablate.published("") is not None
