"""Same object or not: how often pairs of samples are told apart, and a threshold for a wanted rate.

python -m extras.verify CKPT --out FOLDER                      rates; FOLDER/verify.json, verify.png
python -m extras.verify CKPT --fmr 1e-2 --calibrate-on DIR     and threshold.json beside CKPT

A pair is a query and a gallery sample: genuine if of one identity, seen by different cameras (the
same camera's are left out, as in the ranking), impostor if of two. It is called a match from a
threshold of the cosine on. FMR: the share of impostor pairs that are; TPR: of genuine pairs.

Shapes: Q queries, G gallery samples, I identities, R resamples of them, T thresholds.
"""

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
import evaluate
import runtime
from extras import pictures
from extras.search import THRESHOLD_FILE, fingerprint
from runtime import UserError

RATES = (1e-1, 1e-2, 1e-3, 1e-4)
BINS = 2**20  # of similarities from -1 to 1: as fine as a cosine in float32 is exact
POINTS = 512  # of a curve along each axis: what is resampled
RESAMPLES = 1000
ENOUGH = 30  # false matches that a rate rests on: the "rule of 30" (Doddington et al. 2000)

Interval = tuple[float, float, float]  # a rate, and its 95% interval


# --- pairs


def blocks(ranking: evaluate.Ranking) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """A query identity's pid, its similarities' bins (rows, G), genuine and impostor (rows, G).

    A sixteenth of BLOCK similarities at a time: bins and masks take that much more memory.
    """
    query, gallery = ranking.query, ranking.gallery
    step = max(1, evaluate.BLOCK // 16 // len(gallery.pids))
    changes = (query.pids.diff().nonzero()[:, 0] + 1).tolist()
    for first, last in zip([0, *changes], [*changes, len(query.pids)], strict=True):
        same = gallery.pids == query.pids[first]
        for start in range(first, last, step):
            end = min(start + step, last)
            bins = (ranking.similarities(start, end) + 1).mul_(BINS / 2).long()
            other_key = query.keys[start:end, None] != gallery.keys
            impostor = (~same).expand_as(bins)
            yield int(query.pids[first]), bins.clamp_(0, BINS - 1), same & other_key, impostor


def at_least(histogram: Tensor) -> Tensor:
    """The share at or above each bin, (..., bins) -> (..., bins + 1), where the last is 0."""
    counts = histogram.double().flip(-1).cumsum(-1).flip(-1)
    return torch.cat([counts / counts[..., :1], torch.zeros_like(counts[..., :1])], -1)


def resample(
    ranking: evaluate.Ranking, edges: Tensor, resamples: int, seed: int
) -> tuple[Tensor, Tensor]:
    """FMR and TPR at these bins' edges (T,), each (R, T), of identities drawn with replacement.

    Pairs are not independent, identities are: one drawn w times has its genuine pairs w times, and
    its impostor pairs with one drawn v times w * v times (Owen 2007). NaN where a draw has no pair.
    """
    pids = torch.cat([ranking.query.pids, ranking.gallery.pids]).unique()
    I, T = len(pids), len(edges)  # noqa: E741
    draws = runtime.numpy_rng(seed, I).multinomial(I, np.full(I, 1 / I), resamples)
    weight = torch.from_numpy(draws).float()  # (R, I)
    coarse = torch.searchsorted(edges, torch.arange(BINS), right=True)  # (BINS,): 0 to T
    cell = torch.searchsorted(pids, ranking.gallery.pids) * (T + 1)  # (G,)
    genuine = torch.zeros(resamples, T + 1, dtype=torch.float64)
    impostor = torch.zeros_like(genuine)
    for pid, bins, right, wrong in blocks(ranking):
        own = weight[:, torch.searchsorted(pids, pid), None]  # (R, 1)
        bins = coarse[bins]
        genuine += own * bins[right].bincount(minlength=T + 1)
        # By the other identity first: pairs are counted once, whatever number of resamples
        counts = (cell + bins)[wrong].bincount(minlength=I * (T + 1))
        impostor += own * (weight @ counts.view(I, T + 1).float())
    return at_least(impostor)[:, 1:-1], at_least(genuine)[:, 1:-1]


class Rates(NamedTuple):
    """What thresholds do to a ranking's pairs; see `measure`."""

    genuine: Tensor  # pairs in each bin, (BINS,)
    impostor: Tensor
    fmr: Tensor  # from each bin's lower edge on, (BINS + 1,)
    tpr: Tensor
    edges: Tensor  # bins, (T,): where the resamples' rates are, (R, T)
    fmr_drawn: Tensor
    tpr_drawn: Tensor
    identities: int

    def threshold(self, rate: float) -> float:
        """The least threshold that keeps to a false-match rate. Raises UserError without one."""
        place = int((self.fmr > rate).sum())
        if place == BINS:
            raise UserError(f"more than {rate:g} of the impostor pairs have a similarity of 1")
        return 2 * place / BINS - 1

    def tpr_at(self, rate: float) -> Interval | None:
        """TPR at a false-match rate, each resample at its own threshold; None: too few pairs."""
        if self.impostor.sum() * rate < ENOUGH:
            return None
        return interval(self.tpr[(self.fmr > rate).sum()], self.tpr_drawn_at(rate))

    def tpr_drawn_at(self, rate: float) -> Tensor:
        place = (self.fmr_drawn > rate).sum(1, keepdim=True)  # (R, 1)
        last = self.tpr_drawn.shape[1] - 1
        tpr = self.tpr_drawn.gather(1, place.clamp(max=last))
        return tpr.masked_fill(place > last, 0)[:, 0]

    def equal_error(self) -> Interval:
        """Where FMR and 1 - TPR meet; between two thresholds their mean."""
        drawn = equal_error(self.fmr_drawn, self.tpr_drawn)
        return interval(equal_error(self.fmr[None], self.tpr[None])[0], drawn)

    def at(self, threshold: float) -> tuple[Interval, Interval]:
        """FMR and TPR at a threshold that `measure` was given, or has chosen itself."""
        place = bin_of(threshold)
        column = int(torch.searchsorted(self.edges, place))
        return (
            interval(self.fmr[place], self.fmr_drawn[:, column]),
            interval(self.tpr[place], self.tpr_drawn[:, column]),
        )


def bin_of(threshold: float) -> int:
    return round((threshold + 1) * BINS / 2)


def interval(value: Tensor, drawn: Tensor) -> Interval:
    low, high = np.nanpercentile(drawn.numpy(), (2.5, 97.5))
    return float(value), float(low), float(high)


def equal_error(fmr: Tensor, tpr: Tensor) -> Tensor:
    """Of each row of rates (rows, T): (rows,)."""
    place = (fmr - (1 - tpr)).abs().argmin(1, keepdim=True)
    return (fmr.gather(1, place) + 1 - tpr.gather(1, place))[:, 0] / 2


def measure(
    ranking: evaluate.Ranking, rates=(), thresholds=(), resamples: int = RESAMPLES, seed: int = 0
) -> Rates:
    """Rates at every threshold, and resampled ones, of `rates` and `thresholds` among others."""
    genuine, impostor = torch.zeros(2, BINS, dtype=torch.int64)
    for _, bins, right, wrong in blocks(ranking):
        for counts, which in ((genuine, right), (impostor, wrong)):
            places = bins[which]
            counts.scatter_add_(0, places, torch.ones_like(places))
    if not impostor.sum():
        raise UserError("all samples are of one identity: no pair of different ones to tell apart")
    fmr, tpr = at_least(impostor), at_least(genuine)
    shares = torch.logspace(-np.log10(impostor.sum().item()), 0, POINTS, dtype=torch.float64)
    shares = torch.cat([shares, torch.tensor([*RATES, *rates], dtype=torch.float64)])
    steps = torch.linspace(0, 1, POINTS, dtype=torch.float64)
    # Both fall with the threshold: searched from the other end
    places = [torch.searchsorted(-fmr, -shares), torch.searchsorted(-tpr, -steps)]
    given = torch.tensor([bin_of(threshold) for threshold in thresholds], dtype=torch.int64)
    edges = torch.cat([*places, given]).clamp(max=BINS - 1).unique()
    drawn = resample(ranking, edges, resamples, seed)
    count = len(torch.cat([ranking.query.pids, ranking.gallery.pids]).unique())
    return Rates(genuine, impostor, fmr, tpr, edges, *drawn, count)


# --- a threshold, chosen on identities that the model was not trained on


def calibration(args: argparse.Namespace, checkpoint: dict, size) -> tuple[data.Split, data.Split]:
    """Query and gallery to choose a threshold on: of --calibrate-on, or held out by --val-ids."""
    if args.calibrate_on:
        if not args.calibrate_on.is_dir():  # the synthetic set would be rendered there
            raise UserError(f"--calibrate-on {args.calibrate_on}: no such folder")
        source = (args.dataset, args.calibrate_on, args.modalities, size)
        other = data.load_dataset(*source, ranges=args.range)
        return other.query, other.gallery
    settings = checkpoint["settings"]
    if not settings.get("val_ids"):
        raise UserError(
            f"{args.checkpoint}: trained without --val-ids, and a threshold chosen on identities"
            " that it was trained on would be optimistic; give --calibrate-on DATA_ROOT with others"
        )
    root = settings["data_root"] if Path(settings["data_root"]).is_dir() else args.data_root
    source = (settings["dataset"], root, args.modalities, size)
    dataset = data.load_dataset(*source, ranges=args.range)
    rest, query, gallery = data.hold_out(dataset.train, settings["val_ids"])
    if rest.pids.unique().tolist() != checkpoint.get("pids"):
        raise UserError(
            f"{root}: its training identities are not those that {args.checkpoint} was trained on;"
            " give --calibrate-on DATA_ROOT with others"
        )
    return query, gallery


def choose(args: argparse.Namespace, embedder: evaluate.Embedder, splits) -> dict:
    """The threshold for --fmr, with what it was chosen on; written beside the checkpoint."""
    rates = measure(evaluate.rank_splits(embedder, *splits), (args.fmr,), seed=args.seed)
    where = args.calibrate_on or "what --val-ids held out"
    pairs = int(rates.impostor.sum())
    if pairs * args.fmr < ENOUGH:
        needed = round(ENOUGH / args.fmr)
        raise UserError(
            f"--fmr {args.fmr:g}: {where} gives {pairs} impostor pairs, expected at least {needed},"
            f" of which {ENOUGH} match; calibrate on more samples, or choose a larger rate"
        )
    threshold = rates.threshold(args.fmr)
    measured, low, high = rates.at(threshold)[0]
    chosen = {
        "threshold": threshold,
        "wanted_fmr": args.fmr,
        "measured_fmr": measured,
        "interval": [low, high],
        "identities": rates.identities,
        "impostor_pairs": pairs,
        "chosen_on": str(where),
        "modalities": list(args.modalities),
        "checkpoint": fingerprint(args.checkpoint),
    }
    path = Path(args.checkpoint).with_name(THRESHOLD_FILE)
    runtime.write_json(path, chosen)
    print(
        f"{path}: {threshold:.4f}, chosen for FMR {args.fmr:g} on {rates.identities} identities"
        f" ({where}), where it is {shown((measured, low, high))}"
    )
    return chosen


def refuse_same(test: data.Split, other: data.Split, folder: Path) -> None:
    files = [
        {path.resolve() for sample in split.samples for path, _ in sample.images.values()}
        for split in (test, other)
    ]
    if files[0] & files[1]:
        raise UserError(
            f"--calibrate-on {folder}: holds the very images that the threshold is tested on;"
            " give a data set of other identities"
        )


# --- results


def shown(rate: Interval) -> str:
    digits = max(1, min(4, 1 - int(np.floor(np.log10(100 * rate[0] or 1)))))
    value, low, high = (f"{100 * x:.{digits}f}" for x in rate)
    return f"{value}% ({low} to {high})"


def exceeds(fmr: Interval, chosen: dict) -> bool:
    """Whether an FMR is above the wanted one by more than the identities of both sets explain.

    The interval of a difference, from those of its terms (Zou and Donner 2008).
    """
    below, above = fmr[0] - fmr[1], chosen["interval"][1] - chosen["measured_fmr"]
    return fmr[0] - chosen["wanted_fmr"] > np.hypot(below, above)


def report(rates: Rates, chosen: dict | None) -> dict:
    """Print the rates; returns them, with their intervals, for verify.json."""
    pairs = {"genuine": int(rates.genuine.sum()), "impostor": int(rates.impostor.sum())}
    print(
        f"{pairs['genuine']} genuine and {pairs['impostor']} impostor pairs of {rates.identities}"
        " identities; in brackets 95% intervals, by drawing identities"
    )
    figures = {"pairs": pairs, "identities": rates.identities, "EER": rates.equal_error()}
    print(f"equal error rate  {shown(figures['EER'])}")
    for rate in RATES:
        figures[f"TPR@{rate:g}"] = tpr = rates.tpr_at(rate)
        needed = f"too few pairs: it takes {round(ENOUGH / rate)} impostors"
        print(f"TPR at FMR {rate:<6g} {shown(tpr) if tpr else needed}")
    if chosen:
        fmr, tpr = rates.at(chosen["threshold"])
        figures["threshold"] = {**chosen, "FMR": fmr, "TPR": tpr}
        wanted, verdict = chosen["wanted_fmr"], "is exceeded" if exceeds(fmr, chosen) else "holds"
        print(
            f"at threshold {chosen['threshold']:.4f}  FMR {shown(fmr)}, TPR {shown(tpr)}:"
            f" the wanted {wanted:g} {verdict}"
        )
    return figures


def draw(rates: Rates, chosen: dict | None, path: Path) -> None:
    """The ROC curve with its band, and how similar genuine and impostor pairs are."""
    least = min(0.1, ENOUGH / rates.impostor.sum().item())  # left of it the curve rests on few
    x = np.geomspace(least, 1, 100)
    drawn = np.stack([rates.tpr_drawn_at(rate).numpy() for rate in x])
    low, high = 100 * np.nanpercentile(drawn, (2.5, 97.5), axis=1)
    y = [100 * rates.tpr[(rates.fmr > rate).sum()].item() for rate in x]
    roc = {
        "lines": {"TPR": (x, y)},
        "bands": {"95% interval": (x, low, high)},
        "xlabel": "FMR: impostor pairs called a match",
        "ylabel": "TPR: genuine pairs called a match (%)",
        "xscale": "log",
    }
    occupied = (rates.genuine + rates.impostor).nonzero()
    ends = int(occupied.min()), int(occupied.max()) + 1
    places = torch.linspace(*ends, 81).long()
    middle = (places[1:] + places[:-1]) / BINS - 1
    lines = {}
    for label, share in (("one object", rates.tpr), ("two objects", rates.fmr)):
        lines[label] = (middle, -100 * share[places].diff())
    histograms = {
        "lines": lines,
        "bands": {f"_{label}": (x, 0 * y, y) for label, (x, y) in lines.items()},
        "marks": {"threshold": chosen["threshold"]} if chosen else {},
        "xlabel": "similarity (cosine)",
        "ylabel": "share of the pairs (%)",
    }
    pictures.chart([roc, histograms], path)


def parse() -> argparse.Namespace:
    parser = runtime.Parser(__doc__, prog="python -m extras.verify")
    text = "written by train.py or prune.py, e.g. runs/synthetic/last.pt"
    parser.add_argument("checkpoint", metavar="CKPT", help=text)
    data.add_options(parser, trained=True)
    add = runtime.adder(parser)
    text = "choose a threshold for this false-match rate, on identities that were not trained on"
    add("--fmr", None, runtime.real(1e-6, 0.5), text, "RATE")
    text = "a data set of the same kind, whose test split it is chosen on (default: what --val-ids"
    add("--calibrate-on", None, Path, text + " held out in training)", "DIR")
    add("--out", None, Path, "folder for verify.json and verify.png", "FOLDER")
    runtime.add_device_options(parser, precision=None)
    add("--workers", None, runtime.whole(0), "reading processes (default: as in training)")
    add("--seed", 0, runtime.whole(0), "of the resampled identities")
    args = parser.parse_args()
    if args.calibrate_on and not args.fmr:
        raise UserError("--calibrate-on: say for which false-match rate, e.g. --fmr 1e-2")
    return args


@runtime.program
def main() -> None:
    args = parse()
    device = runtime.start(args.device)
    if runtime.world_size() > 1:
        raise UserError("pairs are compared by one process: leave torchrun out")
    embedder, checkpoint = evaluate.load_embedder(args.checkpoint, device)
    evaluate.fill_from_training(args, checkpoint["settings"])
    embedder.precision = args.precision
    embedder.workers = args.workers if args.workers is not None else embedder.workers
    print("settings:", vars(args))
    size = embedder.model.config.image_size
    if unknown := set(args.modalities) - set(embedder.model.config.modalities):
        trained = ",".join(embedder.model.config.modalities)
        raise UserError(f"--modalities {','.join(unknown)}: the model was trained on {trained}")
    chosen = None
    splits = calibration(args, checkpoint, size) if args.fmr else None
    source = (args.dataset, args.data_root, args.modalities, size)
    dataset = data.load_dataset(*source, ranges=args.range)
    if splits:
        refuse_same(dataset.gallery, splits[1], args.calibrate_on)
        chosen = choose(args, embedder, splits)
    ranking = evaluate.rank_splits(embedder, dataset.query, dataset.gallery)
    thresholds = [chosen["threshold"]] if chosen else []
    rates = measure(ranking, thresholds=thresholds, seed=args.seed)
    figures = report(rates, chosen)
    if args.out:
        runtime.make_folder(args.out, "--out")
        runtime.write_json(args.out / "verify.json", figures)
        if importlib.util.find_spec("matplotlib"):
            draw(rates, chosen, args.out / "verify.png")
        else:
            print(f"{args.out}: no verify.png without matplotlib", file=sys.stderr)


if __name__ == "__main__":
    main()
