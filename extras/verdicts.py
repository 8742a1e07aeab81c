"""Judge the paper's claims by kept figures: the first table of RESULTS.md.

python -m extras.verdicts results/

Each claim is that one row of ablate.py's tables has a higher mAP than another, or the same. It is
judged by Student's t test on the runs' mAPs at the 5% level, two-sided, with pooled variance: for
three seeds a side the means must differ by 2.78 standard errors of their difference.
"""

import argparse
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import ablate
import runtime
from ablate import Row, standard_error

# Student's t, 97.5%, for 1, 2, ... degrees of freedom
CRITICAL = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


class Claim(NamedTuple):
    """`first` is ahead of `second`, or, where `same`, not told from it."""

    text: str
    where: str
    first: Row
    second: Row
    same: bool = False


def row(flags: str = "", **look) -> Row:
    return Row("", flags, **look)


def of_table(key: str, label: str) -> Row:
    (found,) = [row for row in ablate.TABLES[key].rows if row.label == label]
    return found


GRAFT, PAIR = row(), row("--modalities rgb,nir")
CLAIMS = (
    Claim("GraFT is ahead of HAMNet", "Table 1", GRAFT, row("--fusion hamnet")),
    Claim("... with two sensors", "Table 2", PAIR, row("--modalities rgb,nir --fusion hamnet")),
    Claim("GraFT is ahead of Multi-Stream ViT", "Table 1", GRAFT, row("--fusion multistream")),
    Claim(
        "... with two sensors", "Table 2", PAIR, row("--modalities rgb,nir --fusion multistream")
    ),
    Claim("GraFT (FFD) is ahead of a new CLS token", "Table 5", GRAFT, row("--fusion cls")),
    Claim("... at the same loss, FFF", "Table 5", row("--triplet FFF"), row("--fusion cls")),
    Claim("... without triplet loss", "Table 5", row("--alpha 0"), row("--fusion cls --alpha 0")),
    Claim("GraFT (FFD) is ahead of averaged tokens", "Table 5", GRAFT, row("--fusion average")),
    Claim("... at the same loss, FFF", "Table 5", row("--triplet FFF"), row("--fusion average")),
    Claim(
        "... without triplet loss", "Table 5", row("--alpha 0"), row("--fusion average --alpha 0")
    ),
    Claim(
        "averaged tokens are ahead of a CLS token",
        "Table 5",
        row("--fusion average"),
        row("--fusion cls"),
    ),
    *(
        Claim(f"three sensors are ahead of {pair}", "Table 6", GRAFT, row(f"--modalities {pair}"))
        for pair in ("rgb,nir", "nir,tir", "rgb,tir")
    ),
    *(
        Claim(f"RGB and NIR are ahead of {one}", "Table 7", PAIR, row(f"--modalities {one}"))
        for one in ("rgb", "nir")
    ),
    *(
        Claim(f"FFD is ahead of {scheme}", "Table 8, 4.3", GRAFT, row(f"--triplet {scheme}"))
        for scheme in ("DDD", "FFF", "FDD", "DFF", "DFD", "DDF", "FDF")
    ),
    Claim("... because of its triplet term", "4.3", GRAFT, row("--alpha 0")),
    *(
        Claim(
            f"data token {index} is as good as the first",
            "6",
            row(f"--data-token {index}"),
            GRAFT,
            same=True,
        )
        for index in ("5", "25")
    ),
    Claim("frozen, then unfrozen is ahead of unfrozen", "4.1", GRAFT, row("--frozen no no")),
    Claim("... and of frozen throughout", "4.1", GRAFT, row("--frozen yes yes")),
    Claim("no center loss in stage 1 is better", "5.2", GRAFT, row("--beta 0.005 0.005")),
    Claim("center loss helps in stage 2", "4.2", GRAFT, row("--beta 0 0")),
    Claim("one fusion token is as good as two", "5.2", GRAFT, row("--fusion-tokens 2"), same=True),
    Claim("... and as four", "5.2", GRAFT, row("--fusion-tokens 4"), same=True),
    Claim("more positives help: eight against one", "5.1", row("--positives 8"), GRAFT),
    Claim(
        "2.5 times smaller is as good, by masks",
        "5.4",
        of_table("4", "0.39 of the weights"),
        PAIR,
        same=True,
    ),
    Claim("... and 3.8 times smaller collapses", "5.4", PAIR, of_table("4", "0.14 of the weights")),
)
UNTESTED = (
    ("GraFT is ahead of DANet and GAFNet", "Tables 1, 2", "neither code nor enough text"),
    ("DeiT-B is the better backbone", "3.2", "weights were not at hand"),
    ("76.6 mAP on RGBNT100, 75.1 on RGBN300", "Tables 1, 2", "data and weights were not at hand"),
    ("deployment on devices", "abstract, 5.4", "see Speed and extras/README.md: it exports"),
)


def judge(claim: Claim, first: list[float], second: list[float]) -> str:
    """The verdict on mAPs in percent; "-" where a side has fewer than two."""
    if min(len(first), len(second)) < 2:
        return "-"
    bound = critical(first, second) * standard_error(first, second)
    difference = mean(first) - mean(second)
    if abs(difference) <= bound:
        return "holds" if claim.same else "does not show"
    if claim.same:
        return f"does not hold: it is {'better' if difference > 0 else 'worse'}"
    return "holds" if difference > 0 else "does not hold: the reverse"


def critical(first: list[float], second: list[float]) -> float:
    return CRITICAL[min(len(first) + len(second) - 2, len(CRITICAL)) - 1]


def lines(common: list[str], args: argparse.Namespace) -> list[list[str]]:
    table = [["claim", "paper", "verdict", "mAP, first and second", "difference ± its error"]]
    for claim in CLAIMS:
        sides = []
        for side in (claim.first, claim.second):
            runs = [ablate.figures(side, seed, common, args) for seed in range(args.seeds)]
            sides.append([100 * metrics["mAP"] for metrics in runs if metrics])
        shown = ", ".join(spread(values) for values in sides)
        difference = "-"
        if min(map(len, sides)) > 1:
            difference = f"{mean(sides[0]) - mean(sides[1]):+.1f} ± {standard_error(*sides):.1f}"
        table.append([claim.text, claim.where, judge(claim, *sides), shown, difference])
    for text, where, why in UNTESTED:
        table.append([text, where, "not testable here", why, "-"])
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
