"""Same object or not: how often two photos are told apart, and a threshold for a wanted rate.

python -m extras.verify CKPT --out FOLDER                      rates; FOLDER/verify.json, verify.png
python -m extras.verify CKPT --fmr 1e-2 --calibrate-on DIR     and threshold.json beside CKPT

A pair is a query and a gallery sample. Genuine pairs show one identity, seen by different cameras
(those of one camera are left out, as in the ranking); impostor pairs show two identities. Pairs of
at least a threshold's similarity (cosine) match. FMR is the share of impostor pairs that match, TPR
the share of genuine pairs that do.

Shapes: Q queries, G gallery samples, I identities, T thresholds.
"""

import argparse
import hashlib
import importlib.util
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

    def place(self, rate: float) -> int:
        """Where the least threshold is that keeps to a false-match rate."""
        return min(int((self.fmr > rate).sum()), len(self.fmr) - 1)

    def at(self, threshold: float) -> tuple[Interval, Interval]:
        """FMR and TPR at a threshold that `measure` was given, or chose for a rate."""
        t = int(np.searchsorted(self.thresholds, threshold))
        fmr = interval(self.fmr[t], self.fmr_without[:, t])
        return fmr, interval(self.tpr[t], self.tpr_without[:, t])

    def tpr_at(self, rate: float) -> Interval:
        """TPR at a false-match rate; without an identity, the threshold moves, too."""
        curves = zip(self.fmr_without, self.tpr_without, strict=True)
        without = [crossing(fmr, tpr, rate) for fmr, tpr in curves]
        return interval(self.tpr[self.place(rate)], without)

    def equal_error(self) -> Interval:
        """Where FMR equals 1 - TPR."""
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
        raise UserError("all samples are of one identity: no pair of different ones to tell apart")
    shares = (*np.geomspace(1 / len(impostor), 1, POINTS), *RATES, *rates)
    at_rates = [least_threshold(impostor, rate) for rate in shares]
    along_tpr = [least_threshold(genuine, rate) for rate in np.linspace(0, 1, POINTS)]
    T = np.unique([-2.0, *at_rates, *along_tpr, *thresholds])
    pids = torch.cat([query.pids, gallery.pids]).unique()
    # Pairs at or above each threshold that an identity has a part in, (I, T)
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
    """How many values are at or above each threshold."""
    return len(ascending) - np.searchsorted(ascending, thresholds)


def least_threshold(ascending: np.ndarray, rate: float) -> float:
    """The least threshold that at most this share of the similarities reach."""
    allowed = min(int(rate * len(ascending)), len(ascending) - 1)
    return float(np.nextafter(ascending[-1 - allowed], np.float32(2)))


def crossing(falling: np.ndarray, values: np.ndarray, level: float) -> float:
    """`values` where the curve `falling` crosses a level, linear between two thresholds."""
    return float(np.interp(-level, -falling, values))


def interval(rate: float, without: np.ndarray | list[float]) -> Interval:
    """A rate's 95% interval, from the rates when one identity is left out, (I,).

    Pairs are not independent, identities are: a jackknife over these, of the rate's log-odds, with
    Student's t. In simulations of 50 identities it covers 94 to 98%, and 99% where no identity is
    mistaken for others more easily than the next.
    """
    left = np.clip(np.array(without, np.float64), 1e-12, 1 - 1e-12)
    left = left[~np.isnan(left)]
    rate, degrees, z = float(rate), len(left) - 1, 1.96
    if not 0 < rate < 1 or degrees < 1:
        bound = 3 / max(1, len(left))  # the rule of three: what none of I shows, 3 in I may
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
    settings, size = embedder.settings, embedder.model.config.image_size
    if args.calibrate_on:
        source = (args.dataset, args.calibrate_on, args.modalities, size)
        other = data.load_dataset(*source, need=("query", "gallery"))
        refuse_known(args.calibrate_on, tested, other)
        return other.query, other.gallery
    if not settings.get("val_ids"):
        raise UserError(
            f"{args.checkpoint}: trained without --val-ids, and a threshold chosen on identities"
            " that it was trained on would be optimistic; give --calibrate-on DATA_ROOT with others"
        )
    root = settings["data_root"] if Path(settings["data_root"]).exists() else args.data_root
    dataset = data.load_dataset(settings["dataset"], root, args.modalities, size, need=("train",))
    rest, query, gallery = data.hold_out(dataset.train, settings["val_ids"])
    trained = runtime.load_checkpoint(args.checkpoint).get("pids")
    if rest.pids.unique().tolist() != trained:
        raise UserError(
            f"{root}: its training identities are not those that {args.checkpoint} was trained on;"
            " give --calibrate-on DATA_ROOT with others"
        )
    return query, gallery


def refuse_known(folder: Path, tested: data.Dataset, other: data.Dataset) -> None:
    """Raise UserError where identities of `other` are known from `tested`: they share an image."""
    known = {**contents(tested.train), **contents(tested.query), **contents(tested.gallery)}
    found = {**contents(other.query), **contents(other.gallery)}
    if shared := sorted({pid for digest, pid in found.items() if digest in known}):
        names = ", ".join(map(str, shared[:3])) + (", ..." if len(shared) > 3 else "")
        raise UserError(
            f"--calibrate-on {folder}: {len(shared)} of its identities ({names}) are in the data"
            " set that the model was trained or is tested on, by the same images; give a data set"
            " of other identities"
        )


def contents(split: data.Split) -> dict[str, int]:
    """The digest of each sample's pixels, whatever its files are called, and its identity."""

    def digest(sample: data.Sample) -> str:
        pixels = b"".join(image.numpy().tobytes() for image in split.read(sample).values())
        return hashlib.sha256(pixels).hexdigest()

    digests = data.in_threads(digest, split.samples, "comparing")
    return dict(zip(digests, split.pids.tolist(), strict=True))


def choose(args: argparse.Namespace, embedder: evaluate.Embedder, splits) -> dict:
    """The threshold for --fmr, with what it was chosen on; written beside the checkpoint."""
    rates = measure(evaluate.rank_splits(embedder, *splits), (args.fmr,))
    where, pairs = args.calibrate_on or "what --val-ids held out", rates.pairs["impostor"]
    if pairs * args.fmr < ENOUGH:
        needed = round(ENOUGH / args.fmr)
        raise UserError(
            f"--fmr {args.fmr:g}: {where} gives {pairs} impostor pairs, expected at least {needed},"
            f" of which {ENOUGH} match; calibrate on more samples, or choose a larger rate"
        )
    threshold = float(rates.thresholds[rates.place(args.fmr)])
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
    path, on = threshold_file(args.checkpoint), f"{chosen['identities']} identities ({where})"
    runtime.write_json(path, chosen)
    print(f"{path}: {threshold:.4f}, chosen for FMR {args.fmr:g} on {on}: there {shown(measured)}")
    return chosen


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
    pairs, identities = rates.pairs, len(rates.fmr_without)
    print(
        f"{pairs['genuine']} genuine and {pairs['impostor']} impostor pairs of {identities}"
        " identities; in brackets 95% intervals, by leaving out one identity at a time"
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
        wanted, verdict = chosen["wanted_fmr"], "is exceeded" if exceeds(fmr, chosen) else "holds"
        print(
            f"at threshold {chosen['threshold']:.4f}  FMR {shown(fmr)}, TPR {shown(tpr)}:"
            f" the wanted {wanted:g} {verdict}"
        )
    return figures


def draw(rates: Rates, chosen: dict | None, path: Path) -> None:
    """The ROC curve with its band, and how similar genuine and impostor pairs are."""
    # On the left the curve would rest on few false matches
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
        "xlabel": "similarity (cosine)",
        "ylabel": "share of the pairs (%)",
    }
    pictures.chart([roc, histograms], path)


def parse() -> argparse.Namespace:
    parser = evaluate.make_parser(__doc__, prog="python -m extras.verify")
    add = parser.add_argument
    text = "choose a threshold for this false-match rate, on identities that were not trained on"
    add("--fmr", type=runtime.real(1e-6, 0.5), metavar="RATE", help=text)
    text = (
        "a data set of the same kind, on whose test split the threshold is chosen (default: on the"
        " identities that --val-ids held out in training)"
    )
    add("--calibrate-on", type=Path, metavar="DIR", help=text)
    add("--out", type=Path, metavar="FOLDER", help="folder for verify.json and verify.png")
    args = parser.parse_args()
    if args.calibrate_on and not args.fmr:
        raise UserError("--calibrate-on: say for which false-match rate, e.g. --fmr 1e-2")
    return args


@runtime.program
def main() -> None:
    args = parse()
    if args.fmr:
        runtime.check_output(threshold_file(args.checkpoint), "--fmr")
    embedder, dataset = evaluate.open_checkpoint(args)
    if runtime.world_size() > 1:
        raise UserError("pairs are compared by one process: leave torchrun out")
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
        print(f"{args.out / 'verify.json'}: these figures")
        if importlib.util.find_spec("matplotlib"):
            draw(rates, chosen, args.out / "verify.png")
            print(f"{args.out / 'verify.png'}: TPR over FMR, and how similar pairs are")
        else:
            runtime.warn(f"{args.out}: no verify.png without matplotlib")


if __name__ == "__main__":
    main()
