"""Judge the paper's claims by kept figures: is a row ahead of another, or as good?

python -m experiments.verdicts results/

Options for all rows may follow; then only the claims that have figures are listed.
"""

from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from scipy import stats  # requirements-dev.txt has it

import runtime
from experiments.ablate import Planned, kept_folder, spread, standard_error
from experiments.tables import FFF, PAIR, PLAIN, PLUS, TABLES, Row

MARGIN = 2.0  # points: what "as good" may lose or gain
STATISTICS = """\
The test is Student's, two-sided, at the 5% level, on the figures of the runs: with three seeds a
side, a difference is significant above 2.78 standard errors. Two looks at the same trained models
are compared seed by seed (significant above 4.30). "As good" holds where the whole 95% interval
lies within two points; its p is that of a larger difference, to be below 0.025. "Does not show"
means neither. Where variances differ, Welch's test is the safer one: a verdict that it does not
share says so. Of 60 tests at this level two or three find what is not there, so mind p. "Acts by"
names what differs between the two rows. "By construction": they differ only in what the triplet
loss sees, and where that loss does nothing, no difference can follow."""


class Claim(NamedTuple):
    """`first` is ahead of `second`, by more than `by` points; or, where `same`, as good.

    Each is a row, or train.py's options of one.
    """

    text: str
    where: str
    first: Row | str
    second: Row | str
    same: bool = False
    by: float = 0.0
    metric: str = "mAP"


def of_table(key: str, label: str) -> Row:
    return next(row for row in TABLES[key].rows if row.label == label)


def fusion_claims(name: str, where: str, flags: str) -> list[Claim]:
    """GraFT against another fusion, each by its own loss and both by the same one."""
    return [
        Claim(f"GraFT (FFD) is ahead of {name} (FFF)", where, "", flags),
        Claim("... in Rank-1", where, "", flags, metric="R1"),
        Claim("... at the same loss, FFF", "Table 5", FFF, flags),
        Claim("... both without triplet loss", "Table 5", NONE, f"{flags} {NONE}"),
    ]


NONE, DDD = "--alpha 0", "--triplet DDD"
HAMNET, STREAMS, LATE = "--fusion hamnet", "--fusion multistream", "--fusion late"
CLS, AVERAGE = "--fusion cls", "--fusion average"
BY_DISTANCE = (("", ""), (PLAIN, ", by plain distances (published code)"))
PRUNED, COLLAPSED = (of_table("4", f"{left} of the weights") for left in ("0.39", "0.14"))
FINETUNED = of_table("4", "0.996 of the weights: finetuning alone")
STAGE_2 = of_table("stages", "stage 2 alone, for all epochs")
CENTERS = of_table("stages", "center loss in stage 1, too")
CLAIMS = [
    Claim("GraFT is ahead of HAMNet", "Table 1", "", HAMNET),
    Claim("... with two sensors", "Table 2", PAIR, f"{PAIR} {HAMNET}"),
    *fusion_claims("Multi-Stream ViT", "Table 1", STREAMS),
    Claim("... with two sensors", "Table 2", PAIR, f"{PAIR} {STREAMS}"),
    Claim("... with 0.39 of its backbone's weights", "Fig. 1", PRUNED, f"{PAIR} {STREAMS}"),
    *fusion_claims("a new CLS token", "Table 5", CLS),
    *fusion_claims("averaged tokens", "Table 5", AVERAGE),
    *fusion_claims("the mean of the sensors' CLS tokens", "-", LATE),
    Claim("... both by plus", "-", PLUS, f"{PLUS} {LATE}"),
    Claim("averaged tokens are ahead of a CLS token", "Table 5", AVERAGE, CLS),
    Claim("... both without triplet loss", "Table 5", f"{AVERAGE} {NONE}", f"{CLS} {NONE}"),
]
for names in ("rgb,nir", "nir,tir", "rgb,tir"):
    pair = f"--modalities {names}"
    CLAIMS.append(Claim(f"three sensors are ahead of {names}", "Table 6", "", pair))
    for one in names.split(","):
        single = f"--modalities {one}"
        CLAIMS.append(Claim(f"{names} are ahead of {one} alone", "Tables 6, 7", pair, single))
for distance, text in BY_DISTANCE:
    for scheme in ("FFF", "DDD", "FDD", "DFF", "DFD", "DDF", "FDF"):
        other = f"{distance} --triplet {scheme}"
        CLAIMS.append(Claim(f"FFD is ahead of {scheme}{text}", "Table 8", distance, other))
    because = f"FFD is ahead because of its triplet term{text}"
    CLAIMS.append(Claim(because, "4.3", distance, NONE))
CLAIMS.append(Claim("DDD is ahead of FFF", "Table 8, 6", DDD, FFF))
for scheme in ("FDD", "DFF", "DFD"):
    CLAIMS.append(Claim(f"{scheme} is ahead of DDD", "Table 8, 6", f"--triplet {scheme}", DDD))
for distance, text in BY_DISTANCE:
    for index in (10, 15, 20, 25):
        this, fifth = (f"{distance} --data-token {i}" for i in (index, 5))
        claim = f"data token {index} is as good as 5{text}"
        CLAIMS.append(Claim(claim, "6", this, fifth, same=True))
for text in ("", ", FFF"):
    eight, one = (of_table("positives", f"{count}{text}") for count in (8, 1))
    CLAIMS.append(Claim(f"eight positives are ahead of one{text}", "5.1", eight, one))
CLAIMS += [
    Claim("frozen, then unfrozen is ahead of unfrozen", "4.1", "", "--frozen no no"),
    Claim("... and of frozen throughout", "4.1", "", "--frozen yes yes"),
    Claim("... and of stage 2 alone, for as many epochs", "4.1", "", STAGE_2),
    Claim("no center loss in stage 1 is ahead of one", "5.2", "", CENTERS),
    Claim("center loss in stage 2 is ahead of none", "4.2", "", "--beta 0 0"),
    Claim("one fusion token is ahead of two", "5.2", "", "--fusion-tokens 2"),
    Claim("... and of four", "5.2", "", "--fusion-tokens 4"),
    Claim("0.39 of the backbone's weights are as good as all", "5.4", PRUNED, PAIR, same=True),
    Claim("... as all, finetuned as long", "5.4", PRUNED, FINETUNED, same=True),
    Claim("all are ahead of 0.14 by more than 10 points", "5.4", PAIR, COLLAPSED, by=10.0),
]
MADE, NOT_HERE = "by construction", "not testable here"
UNTESTED = [
    ("one embedding size for any number of sensors", "3.3", MADE, "Eq. (6) is a mean"),
    ("the fusion token gathers all that is matched", "Fig. 4", MADE, "nothing else is"),
    ("GraFT is ahead of DANet and GAFNet", "Tables 1, 2", NOT_HERE, "no public code"),
    ("DeiT-B is the better backbone", "3.2", NOT_HERE, "its weights were not at hand"),
    ("76.6 mAP on RGBNT100, 75.1 on RGBN300", "Tables 1, 2", NOT_HERE, "no such data"),
]


class Verdict(NamedTuple):
    text: str  # "-" where a side has fewer than two runs, or pairs are incomplete
    difference: float = 0.0
    error: float = 0.0
    p: float = 1.0


def judge(claim: Claim, first: list[float], second: list[float], paired: bool = False) -> Verdict:
    """The verdict on figures in percent, by scipy's tests."""
    if min(len(first), len(second)) < 2 or (paired and len(first) != len(second)):
        return Verdict("-")
    shifted = [value - claim.by for value in first]
    if paired:
        found = stats.ttest_rel(shifted, second)
        error = stdev(a - b for a, b in zip(first, second, strict=True)) / len(first) ** 0.5
        text = said(claim, found)
    else:
        found, error = stats.ttest_ind(shifted, second), standard_error(first, second)
        welch = said(claim, stats.ttest_ind(shifted, second, equal_var=False))
        text = said(claim, found)
        text += f" (by Welch's test: {welch})" if welch != text else ""
    difference, p = mean(first) - mean(second), found.pvalue
    if claim.same:  # the larger of two one-sided tests against the margins, at 2.5% each
        p = stats.t.sf((MARGIN - abs(difference)) / max(error, 1e-9), found.df)
    return Verdict(text, difference, error, float(p))


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


def sides(claim: Claim, common: list[str]) -> tuple[Planned, Planned, Planned]:
    """Both rows, and the first as a change of the second, which knows by what way it can act."""
    first, second = (
        side if isinstance(side, Row) else Row("", side) for side in (claim.first, claim.second)
    )
    change = first._replace(base=second.flags, prune=first.prune or second.prune)
    return tuple(Planned(row, common) for row in (first, second, change))


def lines(common: list[str], folder: Path, seeds: range) -> list[list[str]]:
    """The table of verdicts; with options for all rows, only of the claims that have figures."""
    table = [["claim", "paper", "verdict", "figures", "difference ± error", "p", "acts by"]]
    about = ""  # the last claim that is a sentence of its own
    for claim in CLAIMS:
        about = about if claim.text.startswith("...") else claim.text
        first, second, change = sides(claim, common)
        figures = [
            [100 * metrics[claim.metric] for metrics in side.figures(folder, seeds)]
            for side in (first, second)
        ]
        complete = [values if len(values) == len(seeds) else [] for values in figures]
        found = judge(claim, *complete, paired=first.name == second.name)
        effect, p = "-", "-"
        if change.by_construction:
            found = Verdict("by construction")
        elif found.text != "-":
            effect = f"{found.difference:+.1f} ± {found.error:.1f}"
            p = f"{found.p:.3f}" if found.p >= 0.001 else "< 0.001"
        elif common:
            continue
        alone = claim.text.startswith("...") and about not in [cells[0] for cells in table]
        text, shown = f"{about} {claim.text}" if alone else claim.text, map(spread, figures)
        table.append([text, claim.where, found.text, ", ".join(shown), effect, p, change.ways])
    if not common:
        table += [[*cells, "-", "-", "-"] for cells in UNTESTED]
    return table


@runtime.program
def main() -> None:
    parser = runtime.Parser(__doc__, prog="python -m experiments.verdicts")
    parser.add_argument("results", type=kept_folder, metavar="DIR", help="of ablate's --keep")
    parser.add_argument("--seeds", type=runtime.whole(2), default=3)
    args, common = parser.parse_known_args()
    table = lines(common, args.results, range(args.seeds))
    print(f"{STATISTICS}\n\n{runtime.markdown(table)}")


if __name__ == "__main__":
    main()
