"""Train as the published code does in one respect, where it differs from the paper: its slips.

python -m experiments.published rgb-files --dataset synthetic --out runs/rgb-files

The rest are train.py's options. D1, D5, ... are DEPARTURES.md's numbers; `python -m
experiments.ablate --table choices` runs all slips.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import data
import losses
import model
import runtime
import train
from runtime import UserError

# What takes the place of a function or method of ours: each is given that, and its arguments


def keep_gradients(make_optimizer, objective, stage, center_lr) -> torch.optim.Optimizer:
    objective.zero_grad()  # each of their stages is a run of its own
    optimizer = make_optimizer(objective, stage, center_lr)
    optimizer.zero_grad = lambda: None
    return optimizer


def rgb_files(prepare, batches, images: dict[str, Tensor], draws: Tensor) -> dict[str, Tensor]:
    """Positives and negatives are the RGB image for every sensor."""
    others = images["rgb"][len(images["rgb"]) // 3 :]  # first come the anchors
    mixed = {name: torch.cat([x[: -len(others)], others]) for name, x in images.items()}
    return prepare(batches, mixed, draws)


def few_partners(steps, sampler: data.TripletSampler, epoch: int) -> np.ndarray:
    """Two positives an identity; four negatives in all, one of them in 85% of the triplets."""
    rows, pids = steps(sampler, epoch).copy(), sampler.pids
    pairs = {pid: np.flatnonzero(pids == pid)[:2] for pid in np.unique(pids)}
    firsts, seconds = np.array([pairs[pid] for pid in pids]).T  # of each sample's identity
    anchors = rows[:, 0]
    rows[:, 1] = np.where(anchors == firsts[anchors], seconds[anchors], firsts[anchors])
    negatives = np.array([pair[0] for pair in pairs.values()][:4])
    rng = runtime.numpy_rng(sampler.seed, 4, epoch)
    drawn = rng.choice(4, anchors.shape, p=(0.85, 0.05, 0.05, 0.05))
    same = pids[negatives[drawn]] == pids[anchors]
    rows[:, 2] = negatives[np.where(same, (drawn + 1) % 4, drawn)]
    return rows


def few_anchors(make_sampler, args, dataset: data.Dataset) -> data.TripletSampler:
    """Triplets of the first sample of each identity and camera alone, again and again."""
    sampler, split = make_sampler(args, dataset), dataset.train
    groups = torch.stack([split.pids, split.keys], 1).numpy()
    _, firsts = np.unique(groups, axis=0, return_index=True)
    steps = sampler.steps

    def own_steps(epoch: int) -> np.ndarray:
        rows = steps(epoch)  # (steps, 3, T)
        triplets = rows.transpose(0, 2, 1).reshape(-1, 3)
        kept = triplets[np.isin(triplets[:, 0], firsts)]
        return np.resize(kept, triplets.shape).reshape(len(rows), -1, 3).transpose(0, 2, 1)

    sampler.steps = own_steps
    return sampler


def erase_apart(augment, images: dict[str, Tensor], draws: Tensor, *settings) -> dict[str, Tensor]:
    """Flips stay common to the sensors; what is erased is drawn for each."""
    augmented = {}
    for i, (name, image) in enumerate(images.items()):
        own = draws.clone()
        own[:, 2:7] = draws[:, 2:7] * 97**i % 1  # still uniform
        augmented |= augment({name: image}, own, *settings)
    return augmented


def random_centroids(start_at_means, center: losses.CenterLoss, features, labels) -> None:
    nn.init.normal_(center.centers)


def narrow_token(init, graft: model.GraFT, config: model.GraFTConfig) -> None:
    init(graft, config)
    nn.init.xavier_uniform_(graft.fusion_token)  # of (1, L, D), not of (L, D)


class Slip(NamedTuple):
    """`does` takes the place of `owner.attribute`; that has an effect only with what it `needs`."""

    owner: object
    attribute: str
    does: Callable
    needs: str


RGB, TOKENS = "rgb among --modalities", "--triplet of tokens, such as FFD"
ERASED, CENTERS, GRAFT = "--erase above 0", "--beta above 0", "--fusion graft"
NEW = "a new --out"  # no checkpoint has the gradients
SLIPS = {
    "unzeroed": Slip(train, "make_optimizer", keep_gradients, NEW),  # D1
    "rgb-files": Slip(train.Batches, "prepare", rgb_files, RGB),  # D5
    "few-partners": Slip(data.TripletSampler, "steps", few_partners, TOKENS),  # D6
    "few-anchors": Slip(train, "make_sampler", few_anchors, TOKENS),  # D7
    "erase-apart": Slip(data, "augment", erase_apart, ERASED),  # D9
    "random-centroids": Slip(losses.CenterLoss, "start_at_means", random_centroids, CENTERS),  # D10
    "narrow-token": Slip(model.GraFT, "__init__", narrow_token, GRAFT),  # D26
}


def given(args: argparse.Namespace) -> dict[str, bool]:
    """Which of the needs these options meet."""
    return {
        NEW: not (args.out / "last.pt").exists(),
        RGB: args.triplet != "hardest" and "rgb" in (args.modalities or ["rgb"]),
        TOKENS: args.triplet != "hardest",
        ERASED: args.erase > 0,
        CENTERS: any(args.beta),
        GRAFT: args.fusion == "graft",
    }


@contextmanager
def slipped(name: str, args: argparse.Namespace) -> Iterator[None]:
    """While it lasts, training by `args` does as the published code. Raises UserError where there
    is no such slip, or where it would change nothing."""
    if name not in SLIPS:
        raise UserError(f"{name}: no such slip; expected one of {', '.join(SLIPS)}")
    slip = SLIPS[name]
    if not given(args)[slip.needs]:
        raise UserError(f"{name}: would change nothing; expected {slip.needs}")
    args.slip = name  # the checkpoint tells, and no other run continues from it
    if name == "random-centroids":
        args.center_lr = 0.0  # nor are they trained
    ours = getattr(slip.owner, slip.attribute)

    def as_published(*args):
        return slip.does(ours, *args)

    with mock.patch.object(slip.owner, slip.attribute, as_published):
        yield


@runtime.program
def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(f"{__doc__}\nslips: {', '.join(SLIPS)}")
        return
    args = train.parse(sys.argv[2:])
    with slipped(sys.argv[1], args):
        train.train(args)


if __name__ == "__main__":
    main()
