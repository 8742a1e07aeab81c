"""Train as the published code does in one respect, where it differs from the paper: its slips.

python -m extras.published rgb-files --dataset synthetic --out runs/rgb-files

The rest are train.py's options. What each slip does to a model is in RESULTS.md; the numbers D1,
D5, ... are README's. `ablate.py --table choices` runs them all.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


def keep_gradients(zero_grad):
    return lambda self, set_to_none=True: None


def rgb_files(prepare):
    def as_published(self, images: dict[str, Tensor], draws: Tensor) -> dict[str, Tensor]:
        first = next(iter(images.values()))
        anchors = len(first) // 3  # then come positives and negatives
        mixed = {n: torch.cat([image[:anchors], first[anchors:]]) for n, image in images.items()}
        return prepare(self, mixed, draws)

    return as_published


def first_epoch(steps):
    return lambda self, epoch: steps(self, 0)


def few_anchors(make_sampler):
    """The first sample of an identity and camera is the anchor in the place of each."""

    def as_published(args, dataset: data.Dataset) -> data.TripletSampler:
        sampler, split = make_sampler(args, dataset), dataset.train
        groups = torch.stack([split.pids, split.keys], 1).numpy()
        _, first, group = np.unique(groups, axis=0, return_index=True, return_inverse=True)
        firsts, steps = first[group.ravel()], sampler.steps

        def own_steps(epoch: int) -> np.ndarray:
            rows = steps(epoch).copy()
            rows[:, 0] = firsts[rows[:, 0]]
            return rows

        sampler.steps = own_steps
        return sampler

    return as_published


def erase_apart(augment):
    """Flips stay common to the sensors; each has draws of its own for what is erased."""

    def as_published(images: dict[str, Tensor], draws: Tensor, *settings) -> dict[str, Tensor]:
        augmented = {}
        for i, (name, image) in enumerate(images.items()):
            own = torch.cat([draws[:, :2], draws[:, 2:] * 97**i % 1], 1)  # still uniform
            augmented |= augment({name: image}, own, *settings)
        return augmented

    return as_published


def random_centroids(start_at_means):
    return lambda self, features, labels: nn.init.normal_(self.centers)


def narrow_token(init):
    def as_published(self, config: model.GraFTConfig):
        init(self, config)
        nn.init.xavier_uniform_(self.fusion_token)  # of (1, L, D), not of (L, D)

    return as_published


SLIPS = {  # name -> where it is, what it becomes there
    "unzeroed": (torch.optim.AdamW, "zero_grad", keep_gradients),  # D1
    "rgb-files": (train.Run, "prepare", rgb_files),  # D5
    "same-triplets": (data.TripletSampler, "steps", first_epoch),  # D6
    "few-anchors": (train, "make_sampler", few_anchors),  # D7
    "erase-apart": (data, "augment", erase_apart),  # D9; with --erase
    "random-centroids": (losses.CenterLoss, "start_at_means", random_centroids),  # D10
    "narrow-token": (model.GraFT, "__init__", narrow_token),  # D26
}


@contextmanager
def slipped(name: str) -> Iterator[None]:
    """While it lasts, this package does as the published code. Raises UserError: no such slip."""
    if name not in SLIPS:
        raise UserError(f"{name}: no such slip; expected one of {', '.join(SLIPS)}")
    owner, attribute, make = SLIPS[name]
    with mock.patch.object(owner, attribute, make(getattr(owner, attribute))):
        yield


@runtime.program
def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(f"{__doc__}\nslips: {', '.join(SLIPS)}")
        return
    with slipped(sys.argv[1]):
        train.train(train.parse(sys.argv[2:]))


if __name__ == "__main__":
    main()
