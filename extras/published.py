"""Train as the published code does in one respect, where it differs from the paper: its slips.

python -m extras.published rgb-files --dataset synthetic --out runs/rgb-files

The rest are train.py's options. What a slip does to a model is in RESULTS.md; the numbers D1, D5,
... are README's. `ablate.py --table choices` runs them all.
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


def keep_gradients(make_optimizer):
    def as_published(objective, stage, center_lr):
        objective.zero_grad()  # each of their stages is a run of its own
        optimizer = make_optimizer(objective, stage, center_lr)
        optimizer.zero_grad = lambda: None
        return optimizer

    return as_published


def rgb_files(prepare):
    def as_published(self, images: dict[str, Tensor], draws: Tensor) -> dict[str, Tensor]:
        anchors = len(images["rgb"]) // 3  # then come positives and negatives
        others = images["rgb"][anchors:]
        mixed = {name: torch.cat([image[:anchors], others]) for name, image in images.items()}
        return prepare(self, mixed, draws)

    return as_published


def few_partners(steps):
    """Two positives an identity; four negatives in all, one of them in 85% of the triplets."""

    def as_published(self, epoch: int) -> np.ndarray:
        rows, pids = steps(self, epoch).copy(), self.pids
        pairs = {pid: np.flatnonzero(pids == pid)[:2] for pid in np.unique(pids)}
        enough = sum(len(pair) == 2 for pair in pairs.values())
        if enough < max(4, len(pairs)):
            raise UserError(
                f"few-partners: {enough} of {len(pairs)} training identities have two samples;"
                " expected all, and four or more"
            )
        firsts, seconds = np.array([pairs[pid] for pid in pids]).T  # of each sample's identity
        anchors = rows[:, 0]
        rows[:, 1] = np.where(anchors == firsts[anchors], seconds[anchors], firsts[anchors])
        negatives = np.array([pair[0] for pair in pairs.values()][:4])
        rng = runtime.numpy_rng(self.seed, 4, epoch)
        drawn = rng.choice(4, anchors.shape, p=(0.85, 0.05, 0.05, 0.05))
        same = pids[negatives[drawn]] == pids[anchors]
        rows[:, 2] = negatives[np.where(same, (drawn + 1) % 4, drawn)]
        return rows

    return as_published


def few_anchors(make_sampler):
    """Triplets of the first sample of each identity and camera alone, again and again."""

    def as_published(args, dataset: data.Dataset) -> data.TripletSampler:
        sampler, split = make_sampler(args, dataset), dataset.train
        groups = torch.stack([split.pids, split.keys], 1).numpy()
        _, firsts = np.unique(groups, axis=0, return_index=True)
        steps = sampler.steps

        def own_steps(epoch: int) -> np.ndarray:
            rows = steps(epoch)
            triplets = rows.transpose(0, 2, 1).reshape(-1, 3)
            kept = triplets[np.isin(triplets[:, 0], firsts)]
            repeated = np.resize(kept, triplets.shape)
            return repeated.reshape(len(rows), -1, 3).transpose(0, 2, 1)

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


class Slip(NamedTuple):
    """What becomes of `owner.attribute`, and which settings give it any effect."""

    owner: object
    attribute: str
    make: Callable
    needs: str
    effective: Callable[[argparse.Namespace], bool]


def in_triplets(args: argparse.Namespace) -> bool:
    return args.sampling == "triplets"


SLIPS = {
    "unzeroed": Slip(  # D1
        train, "make_optimizer", keep_gradients, "an --out that is new",  # no checkpoint has them
        lambda args: not (args.out / "last.pt").exists(),
    ),
    "rgb-files": Slip(  # D5
        train.Run, "prepare", rgb_files, "rgb among --modalities, --sampling triplets",
        lambda args: in_triplets(args) and "rgb" in (args.modalities or ["rgb"]),
    ),
    "few-partners": Slip(  # D6
        data.TripletSampler, "steps", few_partners, "--sampling triplets", in_triplets
    ),
    "few-anchors": Slip(  # D7
        train, "make_sampler", few_anchors, "--sampling triplets", in_triplets
    ),
    "erase-apart": Slip(  # D9
        data, "augment", erase_apart, "--erase above 0", lambda args: args.erase > 0
    ),
    "random-centroids": Slip(  # D10
        losses.CenterLoss, "start_at_means", random_centroids, "--center-lr 0, --beta above 0",
        lambda args: args.center_lr == 0 and any(args.beta),
    ),
    "narrow-token": Slip(  # D26
        model.GraFT, "__init__", narrow_token, "--fusion graft",
        lambda args: args.fusion == "graft",
    ),
}  # fmt: skip


@contextmanager
def slipped(name: str, args: argparse.Namespace) -> Iterator[None]:
    """While it lasts, training by `args` does as the published code.

    Raises UserError where there is no such slip, or where it would change nothing.
    """
    if name not in SLIPS:
        raise UserError(f"{name}: no such slip; expected one of {', '.join(SLIPS)}")
    slip = SLIPS[name]
    if not slip.effective(args):
        raise UserError(f"{name}: has no effect as it is; expected {slip.needs}")
    args.slip = name  # config.json and the checkpoint tell, and no other run goes on from it
    as_published = slip.make(getattr(slip.owner, slip.attribute))
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
