"""Train with one departure from our code: as the published code does it, or as the paper prints it.

python -m experiments.published rgb-files --dataset synthetic --out runs/rgb-files

The rest are train.py's options. DEPARTURES.md describes the slips under their numbers, D1, D4, ...;
`python -m experiments.ablate --table choices` runs all of them.
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

# Each takes the place of a function or method of ours, which it is given before the arguments


def keep_gradients(make_optimizer, objective, stage, center_lr) -> torch.optim.Optimizer:
    objective.zero_grad()  # there, each stage is a run of its own
    optimizer = make_optimizer(objective, stage, center_lr)
    optimizer.zero_grad = lambda: None
    return optimizer


def rgb_files(prepare, batches, images: dict[str, Tensor], draws: Tensor) -> dict[str, Tensor]:
    """The RGB image stands for every sensor of positives and negatives."""
    others = images["rgb"][len(images["rgb"]) // 3 :]  # the anchors come first
    mixed = {name: torch.cat([x[: -len(others)], others]) for name, x in images.items()}
    return prepare(batches, mixed, draws)


def few_partners(steps, sampler: data.TripletSampler, epoch: int) -> np.ndarray:
    """Two positives an identity; four negatives in all, one of them in 85% of the triplets."""
    triplets, pids = steps(sampler, epoch).copy(), sampler.pids  # (steps, 3, T)
    pairs = {pid: np.flatnonzero(pids == pid)[:2] for pid in np.unique(pids)}
    firsts, seconds = np.array([pairs[pid] for pid in pids]).T  # of each sample's identity
    anchors = triplets[:, 0]
    triplets[:, 1] = np.where(anchors == firsts[anchors], seconds[anchors], firsts[anchors])
    negatives = np.array([pair[0] for pair in pairs.values()][:4])
    rng = runtime.numpy_rng(sampler.seed, 4, epoch)
    drawn = rng.choice(4, anchors.shape, p=(0.85, 0.05, 0.05, 0.05))
    same = pids[negatives[drawn]] == pids[anchors]
    triplets[:, 2] = negatives[np.where(same, (drawn + 1) % 4, drawn)]
    return triplets


def few_anchors(make_sampler, args, dataset: data.Dataset) -> data.TripletSampler:
    """Only the first sample of each identity and camera is an anchor; as many steps as usual."""
    sampler, split = make_sampler(args, dataset), dataset.train
    groups = torch.stack([split.pids, split.keys], 1).numpy()
    _, firsts = np.unique(groups, axis=0, return_index=True)
    steps = sampler.steps

    def fewer(epoch: int) -> np.ndarray:
        batches = steps(epoch)  # (steps, 3, T)
        triplets = batches.transpose(0, 2, 1).reshape(-1, 3)
        fewer = triplets[np.isin(triplets[:, 0], firsts)]
        repeated = np.resize(fewer, triplets.shape)
        return repeated.reshape(len(batches), -1, 3).transpose(0, 2, 1)

    sampler.steps = fewer
    return sampler


def erase_apart(augment, images: dict[str, Tensor], draws: Tensor, *settings) -> dict[str, Tensor]:
    """All sensors are flipped alike; the erased place is drawn for each."""
    augmented = {}
    for i, (name, image) in enumerate(images.items()):
        redrawn = draws.clone()
        redrawn[:, 2:7] = draws[:, 2:7] * 97**i % 1  # still uniform
        augmented |= augment({name: image}, redrawn, *settings)
    return augmented


def random_centroids(start_at_means, center: losses.CenterLoss, features, labels) -> None:
    nn.init.normal_(center.centers)


def printed_norm(forward, center: losses.CenterLoss, features, labels) -> Tensor:
    return losses.distance(features, center.centers[labels], squared=False).mean()


def narrow_token(init, graft: model.GraFT, config: model.GraFTConfig) -> None:
    init(graft, config)
    nn.init.xavier_uniform_(graft.fusion_token)  # of (1, L, D), not of (L, D)


class Slip(NamedTuple):
    """`does` takes the place of `owner.attribute`. It acts only if train.py's options meet `needs`.

    That is what was expected, in words, and whether they do.
    """

    owner: object
    attribute: str
    does: Callable
    needs: tuple[str, Callable[[argparse.Namespace], bool]]


NEW = ("a new --out", lambda args: not (args.out / "last.pt").exists())  # that lacks gradients
TOKENS = ("--triplet of tokens, such as FFD", lambda args: args.triplet != "hardest")
RGB = (
    "rgb among --modalities, and --triplet of tokens",
    lambda args: args.triplet != "hardest" and "rgb" in (args.modalities or ["rgb"]),
)
ERASED = ("--erase above 0", lambda args: args.erase > 0)
CENTERS = ("--beta above 0", lambda args: any(args.beta))
GRAFT = ("--fusion graft", lambda args: args.fusion == "graft")
SLIPS = {
    "unzeroed": Slip(train, "make_optimizer", keep_gradients, NEW),  # D1
    "rgb-files": Slip(train.Batches, "prepare", rgb_files, RGB),  # D5
    "few-partners": Slip(data.TripletSampler, "steps", few_partners, TOKENS),  # D6
    "few-anchors": Slip(train, "make_sampler", few_anchors, TOKENS),  # D7
    "center-norm": Slip(losses.CenterLoss, "forward", printed_norm, CENTERS),  # D4: the paper's
    "erase-apart": Slip(data, "augment", erase_apart, ERASED),  # D9
    "random-centroids": Slip(losses.CenterLoss, "start_at_means", random_centroids, CENTERS),  # D10
    "narrow-token": Slip(model.GraFT, "__init__", narrow_token, GRAFT),  # D26
}


@contextmanager
def slipped(name: str, args: argparse.Namespace) -> Iterator[None]:
    """A context in which training by `args` has this slip.

    Raises UserError for an unknown slip, and for one that would change nothing.
    """
    if name not in SLIPS:
        raise UserError(f"{name}: no such slip; expected one of {', '.join(SLIPS)}")
    slip = SLIPS[name]
    expected, is_met = slip.needs
    if not is_met(args):
        raise UserError(f"{name}: would change nothing; expected {expected}")
    args.slip = name  # the checkpoint has it, so --resume without the slip is refused
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
