"""Judge the paper's claims by kept figures: is a row ahead of another, or as good?

python -m experiments.verdicts results

train.py's options for all rows may follow; then only the claims that have figures are listed.
"""

from pathlib import Path
from statistics import mean
from typing import NamedTuple

from scipy import stats  # requirements-dev.txt has it

import runtime
from experiments.ablate import SEEDS, Experiment, kept_folder, spread
from experiments.tables import BRIEF, FFF, OWN, PAIR, PLAIN, PLUS, TABLES, Row

MARGIN = 2.0  # points: what "as good" may lose or gain
STATISTICS = """\
Each claim is judged by Student's t test, two-sided, at the 5% level: with three seeds for each row,
a difference is significant above 2.78 standard errors. Two evaluations of the same trained models
are compared seed by seed, and there the bound is 4.30. "As good" holds where the whole 95% interval
of the difference lies between -2 and +2 points; its p tests the hypothesis that the true difference
is two points or more, and must be below 0.025. "Does not show" means that the figures decide
neither way. Welch's test is safer where variances differ; where it disagrees, the verdict says so.
At this level one test in twenty is significant by chance, and there are more than fifty, so mind p.
"Acts by" names what differs between the two rows. "By construction": only what the triplet loss
sees differs, and that loss does nothing."""


class Claim(NamedTuple):
    """`first` is ahead of `second`, by more than `by` points; or, where `same`, as good.

    Both are rows of tables.py, or train.py's options of one.
    """

    text: str
    where: str  # table or section of the paper; "-": ours; "": ours, for `across` alone
    first: Row | str
    second: Row | str
    same: bool = False
    by: float = 0.0
    metric: str = "mAP"


# --- the claims


def of_table(key: str, label: str) -> Row:
    return next(row for row in TABLES[key].rows if row.label == label)


NONE, DDD = "--alpha 0", "--triplet DDD"
HAMNET, STREAMS, LATE = "--fusion hamnet", "--fusion multistream", "--fusion late"
CLS, AVERAGE = "--fusion cls", "--fusion average"
PRUNED, COLLAPSED = (of_table("4", f"{left} of the weights") for left in ("0.39", "0.14"))
FINETUNED = of_table("4", "0.996 of the weights: finetuning alone")
STAGE_2 = of_table("stages", "stage 2 alone, for all epochs")
CENTERS = of_table("stages", "center loss in stage 1, too")
FOUR, ONE = (of_table("positives", f"{count}, FFF") for count in (4, 1))


def fusion_claims(name: str, where: str, flags: str) -> list[Claim]:
    """GraFT against another fusion, each by its own loss and both by the same one."""
    own, none = f"GraFT (FFD) is ahead of {name} (FFF)", f"{flags} {NONE}"
    both = "-" if where == "-" else "Table 5"
    return [
        Claim(own, where, "", flags),
        Claim(f"{own} in Rank-1", where, "", flags, metric="R1"),
        Claim(f"GraFT is ahead of {name}, both by FFF", both, FFF, flags),
        Claim(f"GraFT is ahead of {name}, both without triplet loss", both, NONE, none),
        Claim(f"GraFT (FFD) is ahead of {name} without triplet loss", "", "", none),
    ]


AHEAD, TWO = "GraFT is ahead of", f"{PAIR} {STREAMS}"
CLAIMS = [
    Claim(f"{AHEAD} HAMNet", "Table 1", "", HAMNET),
    Claim(f"{AHEAD} HAMNet with two sensors", "Table 2", PAIR, f"{PAIR} {HAMNET}"),
    *fusion_claims("Multi-Stream ViT", "Table 1", STREAMS),
    Claim(f"{AHEAD} Multi-Stream ViT with two sensors", "Table 2", PAIR, TWO),
    Claim(f"with 0.39 of its backbone's weights, {AHEAD} Multi-Stream ViT", "Fig. 1", PRUNED, TWO),
    *fusion_claims("a new CLS token", "Table 5", CLS),
    *fusion_claims("averaged tokens", "Table 5", AVERAGE),
    *fusion_claims("the mean of the sensors' CLS tokens", "-", LATE),
    Claim("plus is ahead of HAMNet", "-", PLUS, HAMNET),
    Claim("plus is ahead of itself without encoders", "-", PLUS, f"{PLUS} --fusion weighted-late"),
]
averaged = "averaged tokens are ahead of a CLS token"
for loss, text in (("", "FFF"), (NONE, "without triplet loss")):
    first, second = f"{AVERAGE} {loss}", f"{CLS} {loss}"
    CLAIMS.append(Claim(f"{averaged}, {text}", "Table 5", first, second))
for names in ("rgb,nir", "nir,tir", "rgb,tir"):
    pair = f"--modalities {names}"
    CLAIMS.append(Claim(f"three sensors are ahead of {names}", "Table 6", "", pair))
    for one in names.split(","):
        single = f"--modalities {one}"
        CLAIMS.append(Claim(f"{names} are ahead of {one} alone", "Tables 6, 7", pair, single))
for one in ("rgb", "nir", "tir"):
    text = f"three sensors are ahead of {one} alone"
    CLAIMS.append(Claim(text, "Table 6", "", f"--modalities {one}"))
for distance, text in (("", ""), (PLAIN, ", by plain distances (published code)")):
    for scheme in ("FFF", "DDD", "FDD", "DFF", "DFD", "DDF", "FDF"):
        other = f"{distance} --triplet {scheme}"
        CLAIMS.append(Claim(f"FFD is ahead of {scheme}{text}", "Table 8", distance, other))
    because = f"FFD is ahead because of its triplet term{text}"
    CLAIMS.append(Claim(because, "4.3", distance, NONE))
CLAIMS.append(Claim("DDD is ahead of FFF", "Table 8, 6", DDD, FFF))
for scheme in ("FDD", "DFF", "DFD"):
    CLAIMS.append(Claim(f"{scheme} is ahead of DDD", "Table 8, 6", f"--triplet {scheme}", DDD))
FIFTH, LAST = "--data-token 5", "--data-token 25"
for index in (10, 15, 20, 25):
    other = f"--data-token {index}"
    CLAIMS.append(Claim(f"data token {index} is as good as 5", "6", other, FIFTH, same=True))
text = "data token 25 is as good as 5, by plain distances (published code)"
CLAIMS += [
    Claim(text, "6", f"{PLAIN} {LAST}", f"{PLAIN} {FIFTH}", same=True),
    Claim("four positives are ahead of one, FFF", "5.1", FOUR, ONE),
    Claim("frozen, then unfrozen is ahead of unfrozen in both stages", "4.1", "", "--frozen no no"),
    Claim("frozen, then unfrozen is ahead of frozen in both stages", "4.1", "", "--frozen yes yes"),
    Claim("frozen, then unfrozen is ahead of stage 2 for as many epochs", "4.1", "", STAGE_2),
    Claim("no center loss in stage 1 is ahead of one", "5.2", "", CENTERS),
    Claim("center loss in stage 2 is ahead of none", "4.2", "", "--beta 0 0"),
    Claim("one fusion token is ahead of two", "5.2", "", "--fusion-tokens 2"),
    Claim("one fusion token is ahead of four", "5.2", "", "--fusion-tokens 4"),
    Claim("0.39 of the backbone's weights are as good as all", "5.4", PRUNED, PAIR, same=True),
    Claim("0.39 are as good as all, finetuned as long", "5.4", PRUNED, FINETUNED, same=True),
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

# What claims are judged on: train.py's options for all rows
PHOTOS = "--dataset folder --data-root scenes --backbone-weights dinov2-s14.pth"
SETTINGS = {
    "rendered vehicles, small ViT": "",
    "rendered vehicles, DINOv2-S": f"--backbone-weights dinov2-s14.pth {BRIEF}",
    "real photos, DINOv2-S": f"{PHOTOS} {OWN}",
}

# --- the verdicts


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
        test = stats.ttest_rel(shifted, second)
        text = said(claim, test)
    else:
        test = stats.ttest_ind(shifted, second)
        welch = said(claim, stats.ttest_ind(shifted, second, equal_var=False))
        text = said(claim, test)
        text += f" (by Welch's test: {welch})" if welch != text else ""
    low, high = test.confidence_interval()
    error = (high - low) / 2 / stats.t.ppf(0.975, test.df)
    difference, p = mean(first) - mean(second), test.pvalue
    if claim.same:  # the larger of two one-sided tests against the margins, at 2.5% each
        p = stats.t.sf((MARGIN - abs(difference)) / max(error, 1e-9), test.df)
    return Verdict(text, difference, error, p)


def said(claim: Claim, test) -> str:
    """The verdict by the 95% interval of scipy's test."""
    low, high = test.confidence_interval()
    if claim.same:
        inside = low >= -MARGIN and high <= MARGIN
        outside = low > MARGIN or high < -MARGIN
        return "holds" if inside else "does not hold" if outside else "does not show"
    if low > 0:
        return "holds"
    return "the reverse holds" if high < -claim.by else "does not show"


def sides(claim: Claim, common: list[str]) -> tuple[Experiment, Experiment]:
    """Both rows; the first knows through what it differs from the second."""
    first, second = (
        side if isinstance(side, Row) else Row("", side) for side in (claim.first, claim.second)
    )
    return Experiment(first._replace(base=second.flags), common), Experiment(second, common)


def judged(claim: Claim, common: list[str], folder: Path) -> tuple[str, list, Verdict]:
    """By what its rows differ, the figures of both in percent, and the verdict."""
    first, second = sides(claim, common)
    figures = [
        [100 * metrics[claim.metric] for metrics in side.figures(folder, SEEDS)]
        for side in (first, second)
    ]
    ways = first.ways or second.ways
    complete = [values if len(values) == len(SEEDS) else [] for values in figures]
    verdict = judge(claim, *complete, paired=first.name == second.name)
    return ways, figures, Verdict("by construction") if first.by_construction else verdict


def table_of(common: list[str], folder: Path) -> list[list[str]]:
    """The table of verdicts; with options for all rows, only of the claims that have figures."""
    table = [["claim", "paper", "verdict", "figures", "difference ± error", "p", "acts by"]]
    for claim in filter(lambda claim: claim.where, CLAIMS):
        ways, figures, verdict = judged(claim, common, folder)
        effect, p = "-", "-"
        if verdict.error:
            effect = f"{verdict.difference:+.1f} ± {verdict.error:.1f}"
            p = f"{verdict.p:.3f}" if verdict.p >= 0.001 else "< 0.001"
        elif common and verdict.text == "-":
            continue
        row = [claim.text, claim.where, verdict.text, ", ".join(map(spread, figures))]
        table.append([*row, effect, p, ways])
    if not common:
        table += [[*cells, "-", "-", "-"] for cells in UNTESTED]
    return table


def across(folder: Path) -> list[list[str]]:
    """The claims that have figures in more than one setting, with the figures of both rows."""
    table = [["claim", *SETTINGS]]
    for claim in CLAIMS:
        if isinstance(claim.first, Row) or isinstance(claim.second, Row):
            continue  # depends on the data set, which need not be at hand
        cells = []
        for options in SETTINGS.values():
            _, figures, verdict = judged(claim, options.split(), folder)
            text = " and ".join(map(spread, figures))
            text += f": {verdict.text}" if verdict.text != "-" else ""
            cells.append(text if all(figures) else "-")
        if cells.count("-") < len(cells) - 1:
            table.append([claim.text, *cells])
    return table


@runtime.program
def main() -> None:
    parser = runtime.Parser(__doc__, prog="python -m experiments.verdicts")
    parser.add_argument("results", type=kept_folder, metavar="DIR", help="filled by ablate --keep")
    args, common = parser.parse_known_args()
    print(f"{STATISTICS}\n\n{runtime.markdown(table_of(common, args.results))}")


if __name__ == "__main__":
    main()
