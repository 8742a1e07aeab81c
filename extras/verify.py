"""Same object or not: how often two photos are told apart, and a threshold for a wanted error rate.

python -m extras.verify CKPT --out FOLDER                      rates; FOLDER/verify.json, verify.png
python -m extras.verify CKPT --fmr 1e-2 --calibrate-on DIR     and threshold.json beside CKPT

A pair is a query and a gallery sample. Genuine pairs show one identity, seen by different cameras
(pairs of one camera are left out, as in the ranking); impostor pairs show two identities. A pair
matches if its similarity reaches the threshold. FMR, the false-match rate, is the share of
impostor pairs that match; TPR is the share of genuine pairs that match.
"""

import argparse
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data
import evaluate
import runtime
from extras import pictures
from extras.search import threshold_file
from runtime import UserError

# Shapes: Q queries, G gallery samples, I identities, T thresholds

RATES = (1e-1, 1e-2, 1e-3, 1e-4)
POINTS = 512  # of a curve along each axis
ENOUGH = 30  # false matches that a rate needs: the "rule of 30" (Doddington et al. 2000)

Interval = tuple[float, float, float]  # a rate, and its 95% interval


# --- pairs


class Rates(NamedTuple):
    """What thresholds do to a ranking's pairs. `*_without`: when one identity is left out."""

    pairs: dict[str, int]  # genuine, impostor
    thresholds: np.ndarray  # (T,), ascending; the first matches every pair
    fmr: np.ndarray  # (T,)
    tpr: np.ndarray
    fmr_without: np.ndarray  # (I, T); NaN where no pair is left
    tpr_without: np.ndarray

    def index_of(self, rate: float) -> int:
        """The index of the least threshold whose FMR is at most `rate`."""
        return min(int((self.fmr > rate).sum()), len(self.fmr) - 1)

    def at(self, threshold: float) -> tuple[Interval, Interval]:
        """FMR and TPR at a threshold that `measure` was given, or chose for a rate."""
        t = int(np.searchsorted(self.thresholds, threshold))
        fmr = interval(self.fmr[t], self.fmr_without[:, t])
        return fmr, interval(self.tpr[t], self.tpr_without[:, t])

    def tpr_at(self, rate: float) -> Interval:
        """TPR at an FMR; without an identity the threshold of that FMR is another one."""
        curves = zip(self.fmr_without, self.tpr_without, strict=True)
        without = [crossing(fmr, tpr, rate) for fmr, tpr in curves]
        return interval(self.tpr[self.index_of(rate)], without)

    def equal_error(self) -> Interval:
        """The FMR that equals 1 - TPR."""
        curves = zip([self.fmr, *self.fmr_without], [self.tpr, *self.tpr_without], strict=True)
        rate, *without = [crossing(fmr + tpr - 1, fmr, 0) for fmr, tpr in curves]
        return interval(rate, without)


def measure(ranking: evaluate.Ranking, rates=(), thresholds=()) -> Rates:
    """Rates at many thresholds, among them `thresholds` and the least for each of `rates`."""
    query, gallery = ranking.query, ranking.gallery
    similarity = ranking.similarities(0, len(query.pids)).numpy()  # (Q, G)
    same = (query.pids[:, None] == gallery.pids).numpy()
    right = same & (query.keys[:, None] != gallery.keys).numpy()
    genuine, impostor = np.sort(similarity[right]), np.sort(similarity[~same])
    if not len(impostor):
        raise UserError("all samples show one identity, so there are no impostor pairs")
    even = np.linspace(0, 1, POINTS)
    shares = (*np.geomspace(1 / len(impostor), 1, POINTS), *even, *RATES, *rates)
    at_rates = [least_threshold(impostor, rate) for rate in shares]
    along_tpr = [least_threshold(genuine, rate) for rate in even]
    T = np.unique([-2.0, *at_rates, *along_tpr, *thresholds])
    pids = torch.cat([query.pids, gallery.pids]).unique()
    # The pairs of each identity that reach each threshold, (I, T)
    its_genuine, its_impostor = np.zeros((2, len(pids), len(T)), np.int64)
    for i, pid in enumerate(pids):
        asks, answers = (query.pids == pid).numpy(), (gallery.pids == pid).numpy()
        wrong = similarity[asks][:, ~answers], similarity[:, answers][~asks]
        its_impostor[i] = at_least(np.sort(np.concatenate([x.ravel() for x in wrong])), T)
        its_genuine[i] = at_least(np.sort(similarity[asks][right[asks]]), T)
    fmr, tpr = at_least(impostor, T), at_least(genuine, T)
    counts = (fmr, tpr, fmr - its_impostor, tpr - its_genuine)
    with np.errstate(invalid="ignore"):  # 0 / 0 where no pair is left
        curves = [count / count[..., :1] for count in counts]
    return Rates({"genuine": len(genuine), "impostor": len(impostor)}, T, *curves)


def at_least(ascending: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """How many values reach each threshold."""
    return len(ascending) - np.searchsorted(ascending, thresholds)


def least_threshold(ascending: np.ndarray, rate: float) -> float:
    """The least threshold that at most this share of the similarities reach."""
    allowed = min(int(rate * len(ascending)), len(ascending) - 1)
    return float(np.nextafter(ascending[-1 - allowed], np.float32(2)))


def crossing(falling: np.ndarray, values: np.ndarray, level: float) -> float:
    """`values` where the curve `falling` crosses a level, linear between two thresholds."""
    return float(np.interp(-level, -falling, values))


def interval(rate: float, without: np.ndarray | list[float]) -> Interval:
    """A rate and its 95% interval, from the rates when one identity is left out, (I,).

    Pairs that share an identity are not independent, so this is a jackknife over identities, of the
    rate's log-odds, with Student's t. In simulations with 50 identities it covers 94 to 98%, and
    99% if all identities are equally easy to mistake for others.
    """
    left = np.clip(np.array(without, np.float64), 1e-12, 1 - 1e-12)
    left = left[~np.isnan(left)]
    rate, degrees, z = float(rate), len(left) - 1, 1.96
    if not 0 < rate < 1 or degrees < 1:
        # The rule of three: what none of I identities shows may have a rate of up to 3 / I
        bound = 3 / max(1, len(left))
        return rate, max(0.0, rate - bound), min(1.0, rate + bound)
    # Student's quantile from the normal z, by Fisher and Cornish: to 1% from 5 degrees on
    t = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    half = t * np.sqrt(np.log(left / (1 - left)).var() * degrees)
    middle = np.log(rate / (1 - rate))
    low, high = (float(1 / (1 + np.exp(-end))) for end in (middle - half, middle + half))
    return rate, low, high


# --- a threshold, chosen on identities that the model has not seen


def calibration(
    args: argparse.Namespace, embedder: evaluate.Embedder, tested: data.Dataset
) -> tuple[data.Split, data.Split]:
    """Query and gallery to choose a threshold on: of --calibrate-on, or held out by --val-ids."""
    if args.calibrate_on:
        size = embedder.model.config.image_size
        source = (args.dataset, args.calibrate_on, args.modalities, size)
        other = data.load_dataset(*source, need=("query", "gallery"))
        refuse_known(args.calibrate_on, tested, other)
        return other.query, other.gallery
    num_ids = embedder.settings.get("val_ids")
    if not num_ids:
        raise UserError(
            f"{args.checkpoint}: was trained without --val-ids, and a threshold chosen on"
            " identities that it was trained on would be too optimistic; give --calibrate-on DIR"
        )
    rest, query, gallery = data.hold_out(tested.train, num_ids)
    if rest.pids.unique().tolist() != runtime.load_checkpoint(args.checkpoint).get("pids"):
        raise UserError(
            f"{args.data_root}: {args.checkpoint} was trained on other identities, so those that"
            " --val-ids held out are unknown; give --calibrate-on DIR"
        )
    return query, gallery


def refuse_known(folder: Path, tested: data.Dataset, other: data.Dataset) -> None:
    """Raise UserError if an image of `other` is in the data set that trained or tests the model."""
    known = {**contents(tested.train), **contents(tested.query), **contents(tested.gallery)}
    pids = {**contents(other.query), **contents(other.gallery)}
    if shared := sorted({pid for digest, pid in pids.items() if digest in known}):
        names = ", ".join(map(str, shared[:3])) + (", ..." if len(shared) > 3 else "")
        raise UserError(
            f"--calibrate-on {folder}: has {len(shared)} identities ({names}) whose images are in"
            " the data set that the model was trained or is tested on; give other identities"
        )


def contents(split: data.Split) -> dict[str, int]:
    """The digest of each sample's pixels, whatever its files are called, and its identity."""

    def digest(sample: data.Sample) -> str:
        pixels = b"".join(image.numpy().tobytes() for image in split.read(sample).values())
        return hashlib.sha256(pixels).hexdigest()

    digests = data.in_threads(digest, split.samples, "comparing")
    return dict(zip(digests, split.pids.tolist(), strict=True))


def choose(args: argparse.Namespace, embedder: evaluate.Embedder, splits) -> dict:
    """The threshold for --fmr and what it was chosen on, which is written beside the checkpoint."""
    rates = measure(evaluate.rank_splits(embedder, *splits), (args.fmr,))
    where, pairs = args.calibrate_on or "what --val-ids held out", rates.pairs["impostor"]
    if pairs * args.fmr < ENOUGH:
        raise UserError(
            f"--fmr {args.fmr:g}: {where} has {pairs} impostor pairs, but this rate needs"
            f" {round(ENOUGH / args.fmr)}; calibrate on more samples, or choose a larger rate"
        )
    threshold = float(rates.thresholds[rates.index_of(args.fmr)])
    measured = rates.at(threshold)[0]
    chosen = {
        "threshold": threshold,
        "wanted_fmr": args.fmr,
        "measured_fmr": measured[0],
        "interval": measured[1:],
        "identities": len(rates.fmr_without),
        "impostor_pairs": pairs,
        "chosen_on": str(where),
        "modalities": args.modalities,
        "checkpoint": runtime.fingerprint(args.checkpoint),
    }
    path = threshold_file(args.checkpoint)
    runtime.write_json(path, chosen)
    print(f"{path}: the threshold {threshold:.4f}, chosen for an FMR of {args.fmr:g}")
    print(f"chosen on {chosen['identities']} identities ({where}); FMR there {shown(measured)}")
    return chosen


# --- results


def shown(rate: Interval) -> str:
    digits = max(1, min(4, 1 - int(np.floor(np.log10(100 * rate[0] or 1)))))
    value, low, high = (f"{100 * x:.{digits}f}" for x in rate)
    return f"{value}% ({low} to {high})"


def report(rates: Rates, chosen: dict | None) -> dict:
    """Print the rates; returns them, with their intervals, for verify.json."""
    pairs, identities = rates.pairs, len(rates.fmr_without)
    print(
        f"test split: {pairs['genuine']} genuine and {pairs['impostor']} impostor pairs of"
        f" {identities} identities; 95% intervals in brackets"
    )
    figures = {"pairs": pairs, "identities": identities, "EER": rates.equal_error()}
    print(f"equal error rate  {shown(figures['EER'])}")
    for rate in RATES:
        enough = pairs["impostor"] * rate >= ENOUGH
        figures[f"TPR@{rate:g}"] = tpr = rates.tpr_at(rate) if enough else None
        needed = f"too few pairs: {round(ENOUGH / rate)} impostor pairs are needed"
        print(f"TPR at FMR {rate:<6g} {shown(tpr) if tpr else needed}")
    if chosen:
        fmr, tpr = rates.at(chosen["threshold"])
        figures["threshold"] = {**chosen, "FMR": fmr, "TPR": tpr}
        print(f"at threshold {chosen['threshold']:.4f}  FMR {shown(fmr)}, TPR {shown(tpr)}")
    return figures


def draw(rates: Rates, chosen: dict | None, path: Path) -> None:
    """The ROC curve with its band, and how similar genuine and impostor pairs are."""
    # Further left the curve would rest on too few false matches
    x = np.geomspace(min(0.1, ENOUGH / rates.pairs["impostor"]), 0.9, 100)
    y, low, high = 100 * np.array([rates.tpr_at(rate) for rate in x]).T
    roc = {
        "lines": {"TPR": (x, y)},
        "bands": {"95% interval": (x, low, high)},
        "xlabel": "FMR: impostor pairs called a match",
        "ylabel": "TPR: genuine pairs called a match (%)",
        "xscale": "log",
    }
    ends = np.linspace(*rates.thresholds[[1, -1]], 81)
    lines = {}
    for label, share in (("same identity", rates.tpr), ("two identities", rates.fmr)):
        falling = 100 * np.interp(ends, rates.thresholds, share)
        lines[label] = ((ends[1:] + ends[:-1]) / 2, -np.diff(falling))
    histograms = {
        "lines": lines,
        "bands": {f"_{label}": (x, 0 * y, y) for label, (x, y) in lines.items()},
        "marks": {"threshold": chosen["threshold"]} if chosen else {},
        "xlabel": "similarity",
        "ylabel": "share of the pairs (%)",
    }
    pictures.chart([roc, histograms], path)


def parse() -> argparse.Namespace:
    parser = evaluate.make_parser(__doc__, prog="python -m extras.verify")
    add = parser.add_argument
    text = "choose the threshold for this false-match rate, on identities that are new to the model"
    add("--fmr", type=runtime.real(1e-6, 0.5), metavar="RATE", help=text)
    text = "data set whose test split --fmr uses (default: identities that --val-ids held out)"
    add("--calibrate-on", type=Path, metavar="DIR", help=text)
    add("--out", type=Path, metavar="FOLDER", help="write verify.json and verify.png there")
    args = parser.parse_args()
    if args.calibrate_on and not args.fmr:
        raise UserError("--calibrate-on: needs a false-match rate, e.g. --fmr 1e-2")
    return args


@runtime.program
def main() -> None:
    args = parse()
    if args.fmr:
        runtime.check_output(threshold_file(args.checkpoint), "--fmr")
    if args.out:
        pictures.need("matplotlib")
    embedder, dataset = evaluate.open_checkpoint(args)
    if runtime.world_size() > 1:
        raise UserError("one process compares the pairs: start this program without torchrun")
    evaluate.check_matches(dataset.query, dataset.gallery)
    splits = calibration(args, embedder, dataset) if args.fmr else None
    if args.out:
        runtime.make_folder(args.out, "--out")
    chosen = choose(args, embedder, splits) if splits else None
    ranking = evaluate.rank_splits(embedder, dataset.query, dataset.gallery)
    rates = measure(ranking, thresholds=[chosen["threshold"]] if chosen else [])
    figures = report(rates, chosen)
    if args.out:
        runtime.write_json(args.out / "verify.json", figures)
        draw(rates, chosen, args.out / "verify.png")
        print(f"{args.out / 'verify.json'}: these figures")
        print(f"{args.out / 'verify.png'}: TPR over FMR, and how similar pairs are")


if __name__ == "__main__":
    main()
