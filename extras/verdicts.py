"""Judge the paper's claims by kept figures: the first table of RESULTS.md.

python -m extras.verdicts results/

Each claim is that one row of ablate.py's tables is ahead of another, or as good. It is judged by
Student's t test at the 5% level, two-sided, with pooled variance, on the runs' figures: for three
seeds a side the means must differ by 2.78 standard errors. A verdict that Welch's test, which lets
the variances differ, does not share says so. Two looks at the same trained models, say before and
after pruning, are compared in pairs (three: from 4.30 errors on). "As good" holds where the whole
95% interval of the difference lies within MARGIN points; its p is that of a difference beyond them.
Needs scipy.
"""

import argparse
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import ablate
import runtime
from ablate import Row, standard_error
from losses import SCHEMES

MARGIN = 2.0  # points: what "as good" may lose or gain


class Claim(NamedTuple):
    """`first` is ahead of `second`, by more than `by` points; or, where `same`, as good."""

    text: str
    where: str
    first: Row
    second: Row
    same: bool = False
    by: float = 0.0
    metric: str = "mAP"


def row(flags: str = "", **look) -> Row:
    return Row("", flags, **look)


def on(modalities: str, flags: str = "") -> Row:
    return row(f"--modalities {modalities} {flags}".strip())


def of_table(key: str, label: str) -> Row:
    (found,) = [row for row in ablate.TABLES[key].rows if row.label == label]
    return found


GRAFT, PAIR, CLS, AVERAGE = row(), on("rgb,nir"), row("--fusion cls"), row("--fusion average")
FFF = row("--triplet FFF")
STREAMS = "--fusion multistream"
CLAIMS = (
    Claim("GraFT is ahead of HAMNet", "Table 1", GRAFT, row("--fusion hamnet")),
    Claim("... with two sensors", "Table 2", PAIR, on("rgb,nir", "--fusion hamnet")),
    Claim("GraFT is ahead of Multi-Stream ViT", "Table 1", GRAFT, row(STREAMS)),
    Claim("... in Rank-1", "Table 1", GRAFT, row(STREAMS), metric="R1"),
    Claim("... at the same loss, FFF", "Table 5", FFF, row(STREAMS)),
    Claim("... without triplet loss", "Table 5", row("--alpha 0"), row(f"{STREAMS} --alpha 0")),
    Claim("... with two sensors", "Table 2", PAIR, on("rgb,nir", STREAMS)),
    Claim(
        "GraFT at 0.39 of the backbone's weights is ahead of Multi-Stream ViT",
        "Fig. 1",
        of_table("4", "0.39 of the weights"),
        on("rgb,nir", STREAMS),
    ),
    Claim("GraFT (FFD) is ahead of a new CLS token", "Table 5", GRAFT, CLS),
    Claim("... in Rank-1", "Table 5", GRAFT, CLS, metric="R1"),
    Claim("... at the same loss, FFF", "Table 5", FFF, CLS),
    Claim("... without triplet loss", "Table 5", row("--alpha 0"), row("--fusion cls --alpha 0")),
    Claim("GraFT (FFD) is ahead of averaged tokens", "Table 5", GRAFT, AVERAGE),
    Claim("... at the same loss, FFF", "Table 5", FFF, AVERAGE),
    Claim(
        "... without triplet loss", "Table 5", row("--alpha 0"), row("--fusion average --alpha 0")
    ),
    Claim("averaged tokens are ahead of a CLS token", "Table 5", AVERAGE, CLS),
    Claim(
        "... without triplet loss",
        "Table 5",
        row("--fusion average --alpha 0"),
        row("--fusion cls --alpha 0"),
    ),
    *(
        Claim(f"three sensors are ahead of {pair}", "Table 6", GRAFT, on(pair))
        for pair in ("rgb,nir", "nir,tir", "rgb,tir")
    ),
    *(
        Claim(f"{pair} are ahead of {one} alone", "Tables 6, 7", on(pair), on(one))
        for pair in ("rgb,nir", "nir,tir", "rgb,tir")
        for one in pair.split(",")
    ),
    *(
        Claim(f"FFD is ahead of {scheme}", "Table 8, 4.3", GRAFT, row(f"--triplet {scheme}"))
        for scheme in SCHEMES[1:]
    ),
    Claim("FFD is ahead because of its triplet term", "4.3", GRAFT, row("--alpha 0")),
    *(
        Claim(
            f"FFD is ahead of {scheme} by plain distances, as in the published code",
            "Table 8, 4.3",
            row("--plain-distance"),
            row(f"--triplet {scheme} --plain-distance"),
        )
        for scheme in SCHEMES[1:]
    ),
    Claim("DDD is ahead of FFF", "Table 8, 6", row("--triplet DDD"), FFF),
    *(
        Claim(
            f"{scheme} is ahead of DDD",
            "Table 8, 6",
            row(f"--triplet {scheme}"),
            row("--triplet DDD"),
        )
        for scheme in ("FDD", "DFF", "DFD")
    ),
    *(
        Claim(
            f"data token {index} is as good as 5",
            "6",
            row(f"--data-token {index}"),
            row("--data-token 5"),
            same=True,
        )
        for index in ("10", "15", "20", "25")
    ),
    Claim("frozen, then unfrozen is ahead of unfrozen", "4.1", GRAFT, row("--frozen no no")),
    Claim("... and of frozen throughout", "4.1", GRAFT, row("--frozen yes yes")),
    Claim(
        "... and of stage 2 alone, for as many epochs",
        "4.1",
        GRAFT,
        of_table("stages", "stage 2 alone, for all epochs"),
    ),
    Claim("no center loss in stage 1 is ahead of one", "5.2", GRAFT, row("--beta 0.005 0.005")),
    Claim("center loss in stage 2 is ahead of none", "4.2", GRAFT, row("--beta 0 0")),
    Claim("one fusion token is ahead of two", "5.2", GRAFT, row("--fusion-tokens 2")),
    Claim("... and of four", "5.2", GRAFT, row("--fusion-tokens 4")),
    Claim(
        "eight positives are ahead of one after as many steps",
        "5.1",
        row("--positives 8 --epoch-steps 123 123"),
        GRAFT,
    ),
    Claim(
        "0.39 of the backbone's weights are as good as all",
        "5.4",
        of_table("4", "0.39 of the weights"),
        PAIR,
        same=True,
    ),
    Claim(
        "... as all, finetuned as long",
        "5.4",
        of_table("4", "0.39 of the weights"),
        of_table("4", "0.996 of the weights: finetuning alone"),
        same=True,
    ),
    Claim(
        "all are ahead of 0.14 by more than 10 points: it collapses",
        "5.4",
        PAIR,
        of_table("4", "0.14 of the weights"),
        by=10.0,
    ),
)
UNTESTED = (
    ("GraFT is ahead of DANet and GAFNet", "Tables 1, 2", "they have neither code nor enough text"),
    ("DeiT-B is the better backbone", "3.2", "its weights were not at hand"),
    ("76.6 mAP on RGBNT100, 75.1 on RGBN300", "Tables 1, 2", "neither data nor weights at hand"),
)
BY_CONSTRUCTION = (
    ("one embedding size for any number of sensors", "3.3", "Eq. (6) is a mean"),
    ("the fusion token gathers all that is matched", "Fig. 4", "it alone is the embedding"),
)


def judge(claim: Claim, first: list[float], second: list[float], paired: bool = False) -> tuple:
    """The verdict on figures in percent, their difference with its standard error, the test's p.

    ("-", None, None) where a side has fewer than two runs, or looks at one model are not in pairs.
    """
    stats = need_scipy()
    if min(len(first), len(second)) < 2 or (paired and len(first) != len(second)):
        return "-", None, None
    shifted = [value - claim.by for value in first]
    if paired:
        found = stats.ttest_rel(shifted, second)
        error = stdev(a - b for a, b in zip(first, second, strict=True)) / len(first) ** 0.5
    else:
        found, error = stats.ttest_ind(shifted, second), standard_error(first, second)
    verdict = said(claim, found)
    if not paired:
        welch = said(claim, stats.ttest_ind(shifted, second, equal_var=False))
        verdict += f" (by Welch's test: {welch})" if welch != verdict else ""
    p = found.pvalue
    if claim.same:  # the larger of two one-sided tests against the margins, at 2.5% each
        distance = (MARGIN - abs(mean(first) - mean(second))) / max(error, 1e-9)
        p = stats.t.sf(distance, found.df)
    return verdict, (mean(first) - mean(second), error), float(p)


def said(claim: Claim, found) -> str:
    """The verdict by the 95% interval of scipy's test."""
    low, high = found.confidence_interval()
    if claim.same:
        inside = low >= -MARGIN and high <= MARGIN
        outside = low > MARGIN or high < -MARGIN
        return "holds" if inside else "does not hold" if outside else "does not show"
    if low > 0:
        return "holds"
    return "the reverse holds" if high < -claim.by else "does not show"


def need_scipy():
    try:
        from scipy import stats
    except ImportError:
        raise runtime.UserError("verdicts: need scipy (pip install scipy)") from None
    return stats


def lines(common: list[str], args: argparse.Namespace) -> list[list[str]]:
    """The table of verdicts; with options for all rows, only the claims that were judged."""
    table = [["claim", "paper", "verdict", "figures, first and second", "difference ± error", "p"]]
    about = ""  # the last claim that is a sentence of its own
    for claim in CLAIMS:
        about = about if claim.text.startswith("...") else claim.text
        sides = []
        for side in (claim.first, claim.second):
            runs = [ablate.figures(side, seed, common, args) for seed in range(args.seeds)]
            sides.append([100 * metrics[claim.metric] for metrics in runs if metrics])
        complete = [side if len(side) == args.seeds else [] for side in sides]
        models = {ablate.folder(side, common, args) for side in (claim.first, claim.second)}
        verdict, difference, p = judge(claim, *complete, paired=len(models) == 1)
        effect, chance = "-", "-"
        if difference:
            effect = "{:+.1f} ± {:.1f}".format(*difference)
            chance = f"{p:.3f}" if p >= 0.001 else "< 0.001"
        if common and verdict == "-":
            continue
        alone = claim.text.startswith("...") and about not in [cells[0] for cells in table]
        text = f"{about} {claim.text}" if alone else claim.text
        table.append([text, claim.where, verdict, ", ".join(map(spread, sides)), effect, chance])
    if common:
        return table
    for verdict, rows in (("by construction", BY_CONSTRUCTION), ("not testable here", UNTESTED)):
        table += [[text, where, verdict, why, "-", "-"] for text, where, why in rows]
    return table


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


@runtime.program
def main() -> None:
    parser = runtime.Parser(__doc__, prog="python -m extras.verdicts")
    parser.add_argument("results", type=Path, metavar="DIR", help="of ablate.py's --keep")
    parser.add_argument("--seeds", type=runtime.whole(2), default=3)
    args, common = parser.parse_known_args()
    if not args.results.is_dir():
        raise runtime.UserError(f"{args.results}: no such folder; expected one of ablate.py --keep")
    args.from_, args.weights = args.results, {}
    print(runtime.markdown(lines(common, args)))


if __name__ == "__main__":
    main()
