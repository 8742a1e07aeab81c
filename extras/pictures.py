"""Pictures of a model and its rankings: sheets of photos by Pillow, charts by matplotlib.

python -m extras.pictures runs/synthetic            draws RUN/curves.png from RUN/log.jsonl
python -m extras.pictures runs/synthetic --html     puts everything on one page, RUN/report.html

evaluate.py draws its ranked lists, failures, attention maps, CMC curve and map by `draw`.
"""

import argparse
import importlib.util
import json
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import data
import evaluate
import runtime
from runtime import UserError

# Frames: right and wrong are the same identity and another; a match is above the threshold,
# whatever it shows
RIGHT, WRONG, MATCH, PLAIN = (0, 150, 60), (210, 30, 30), (30, 90, 220), (90, 90, 90)
ABSENT = (215, 215, 215)  # where a sample lacks a sensor
HEIGHT, GAP, FRAME, LINE = 72, 8, 4, 15  # pixels: of an image, between cells, a frame, a text line

# --- what evaluate.py asks for

ATTENTION = (
    "Each map runs from its own least attention (black) to its most (white).",
    "Percentages: how much of the attention falls on image patches. The rest stays",
    "on the fusion token itself and on the ViT's tokens that are no patches, like CLS.",
)


def check_queries(words: list[str], query: data.Split) -> None:
    """Raise UserError for a query that there is not."""
    names = [sample.name for sample in query.samples]
    for word in words:
        if word not in ("random", "best", "worst", *names):
            raise UserError(
                f"--queries {word}: no query has this name; expected random, best, worst or a name,"
                f" e.g. {names[0]}"
            )


def draw(args: argparse.Namespace, embedder: evaluate.Embedder, ranking: evaluate.Ranking) -> None:
    """Draw the pictures that evaluate.py's options name, and print a line for each."""
    ap, query = ranking.metrics.ap, ranking.query
    chosen = choose(args.queries, query, ap, args.seed)
    modalities = tuple(dict.fromkeys((*query.modalities, *ranking.gallery.modalities)))
    if args.ranked_list:
        key = "Green: the same identity. Red: another. The query's own camera is left out."
        sheet(ranked_list(ranking, chosen), modalities, args.ranked_list, (key,))
        print(f"{args.ranked_list}: {len(chosen)} queries with their ten best")
    if args.failures:
        key = "Red: the nearest samples of another identity. Green: the first right one."
        worst = choose(["worst"], query, ap, args.seed, 6)
        sheet(failures(ranking, worst), modalities, args.failures, (key,))
        print(f"{args.failures}: the worst queries and what they were taken for")
    if args.cmc:
        chart([cmc_panel(ranking.metrics.cmc)], args.cmc)
        print(f"{args.cmc}: the CMC curve")
    if args.attention:
        pairs = attention(embedder, query, [i for i, _ in chosen])
        rows = [[*a, *b] for a, b in zip_longest(pairs[::2], pairs[1::2], fillvalue=[])]
        sheet(rows, query.modalities, args.attention, ATTENTION)
        print(f"{args.attention}: where the fusion token attends")
    if args.map:
        from extras import tsne

        tsne.draw(embedder, ranking.gallery, args.map, args.seed)
        print(f"{args.map}: t-SNE of gallery samples")


Chosen = list[tuple[int, str]]  # queries, each with the reason why it is drawn


def choose(words: list[str], query: data.Split, ap: Tensor, seed: int, count: int = 2) -> Chosen:
    """Queries to draw: `count` random, best or worst ones, or the one of a name."""
    by_ap = [i for i in ap.argsort().tolist() if not ap[i].isnan()]
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(query), generator=generator).tolist()
    groups = {"random": shuffled[:count], "best": by_ap[::-1][:count], "worst": by_ap[:count]}
    named = {sample.name: [i] for i, sample in enumerate(query.samples)}
    reasons = [(word, word if word in groups else "named") for word in words]
    return [(i, reason) for word, reason in reasons for i in {**named, **groups}[word]]


# --- sheets


class Cell(NamedTuple):
    """One sample in a sheet: images (uint8 (3, H, W)), lines of text above them, frame's colour."""

    images: dict[str, Tensor]
    lines: tuple[str, ...]
    colour: tuple[int, int, int] = PLAIN


def sheet(rows: list[list[Cell]], modalities: tuple[str, ...], path: str | Path, key=()) -> None:
    """Draw rows of cells, a cell's modalities below one another; one that it lacks stays grey.

    `key`: lines of text below the rows. Raises UserError where `path` cannot be written.
    """
    font = ImageFont.load_default(12)

    def text_width(line: str) -> int:
        return round(font.getlength(line))

    cells = [cell for row in rows for cell in row]
    shapes = [image.shape for cell in cells for image in cell.images.values()]
    width = max(round(HEIGHT * W / H) for _, H, W in shapes)
    texts = [text_width(line) for cell in cells for line in cell.lines]
    cell_width = max([width + 2 * FRAME, *texts]) + GAP
    text_height = LINE * max(len(cell.lines) for cell in cells)
    frame_height = len(modalities) * HEIGHT + 2 * FRAME
    row_height = text_height + frame_height + 2 * GAP
    left = max(map(text_width, modalities)) + 2 * GAP
    across = max([left + max(map(len, rows)) * cell_width, *(text_width(k) + 2 * GAP for k in key)])
    below = len(rows) * row_height + GAP
    picture = Image.new("RGB", (across, below + (LINE * len(key) + GAP if key else 0)), "white")
    pen = ImageDraw.Draw(picture)
    for i, line in enumerate(key):
        pen.text((GAP, below + LINE * i), line, "black", font)
    for r, row in enumerate(rows):
        top = GAP + r * row_height + text_height
        for m, modality in enumerate(modalities):
            pen.text((GAP, top + FRAME + m * HEIGHT + HEIGHT // 2 - 8), modality, "black", font)
        for c, cell in enumerate(row):
            x = left + c * cell_width
            for i, line in enumerate(cell.lines):
                pen.text((x, top - text_height + LINE * i), line, "black", font)
            box = (x, top, x + width + 2 * FRAME - 1, top + frame_height - 1)
            pen.rectangle(box, "white", cell.colour, FRAME)
            for m, modality in enumerate(modalities):
                image = Image.new("RGB", (width, HEIGHT), ABSENT)
                if modality in cell.images:
                    image = fit(cell.images[modality])
                offset = FRAME + (width - image.width) // 2
                picture.paste(image, (x + offset, top + FRAME + m * HEIGHT))
    save(picture.save, path)


def fit(image: Tensor) -> Image.Image:
    """An image (3, H, W), uint8, at a sheet's height."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    width = max(1, round(HEIGHT * picture.width / picture.height))
    return picture.resize((width, HEIGHT), Image.Resampling.LANCZOS)


def save(write, path: str | Path) -> None:
    """Call write(path). Raises UserError where that fails."""
    try:
        write(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be written ({error}); expected a file name as picture.png"
        ) from None


def ranked_list(ranking: evaluate.Ranking, chosen: Chosen, top: int = 10) -> list[list[Cell]]:
    """Queries with the `top` gallery samples nearest to them."""
    rows = []
    for i, reason in chosen:
        order, similarity = order_of(ranking, i)
        answers = [answer(ranking, i, j, similarity[j]) for j in order[:top].tolist()]
        rows.append([asked(ranking, i, reason), *answers])
    return rows


def failures(ranking: evaluate.Ranking, chosen: Chosen, top: int = 6) -> list[list[Cell]]:
    """Queries with the wrong samples nearest to them, and the first right one with its rank."""
    rows = []
    for i, reason in chosen:
        order, similarity = order_of(ranking, i)
        right = ranking.gallery.pids[order] == ranking.query.pids[i]
        first = int(right.nonzero()[0])
        cells = [answer(ranking, i, j, similarity[j]) for j in order[~right][:top].tolist()]
        j = int(order[first])
        cells.append(answer(ranking, i, j, similarity[j], f"rank {first + 1}: "))
        rows.append([asked(ranking, i, reason), *cells])
    return rows


def order_of(ranking: evaluate.Ranking, i: int) -> tuple[Tensor, Tensor]:
    """The gallery as the metric ranks it for query i, best first, and all similarities to it.

    Samples of the query's identity and camera (or scene) are left out.
    """
    query, gallery = ranking.query, ranking.gallery
    similarity = ranking.similarities(i, i + 1)[0]
    order = similarity.argsort(descending=True)
    other_pid = gallery.pids[order] != query.pids[i]
    other_key = gallery.keys[order] != query.keys[i]
    return order[other_pid | other_key], similarity


def short_name(sample: data.Sample) -> str:
    return sample.name.rpartition("/")[2]  # holds identity and camera, as the data set writes them


def asked(ranking: evaluate.Ranking, i: int, reason: str) -> Cell:
    line = f"{reason}, AP {100 * ranking.metrics.ap[i]:.1f}%"
    return Cell(ranking.query[i][0], (short_name(ranking.query.samples[i]), line))


def answer(ranking: evaluate.Ranking, i: int, j: int, similarity: float, prefix="") -> Cell:
    sample = ranking.gallery.samples[j]
    colour = RIGHT if sample.pid == ranking.query.samples[i].pid else WRONG
    lines = (prefix + short_name(sample), f"similarity {similarity:.3f}")
    return Cell(ranking.gallery[j][0], lines, colour)


def attention(
    embedder: evaluate.Embedder, split: data.Split, chosen: list[int]
) -> list[list[Cell]]:
    """Samples of a split, each beside a map of the fusion token's attention in every encoder."""
    rows = []
    for i in chosen:
        images, _, _ = split[i]
        batch = {name: image[None] for name, image in images.items()}
        maps = embedder.model.attention(
            embedder.normalise(runtime.to_device(batch, embedder.device))
        )
        maps = {modality: weights[0].float().cpu() for modality, weights in maps.items()}
        heated = {modality: heat(image, maps[modality]) for modality, image in images.items()}
        shares = ", ".join(f"{name} {100 * weights.sum():.0f}%" for name, weights in maps.items())
        sample = Cell(images, (short_name(split.samples[i]), ""))
        rows.append([sample, Cell(heated, ("attention on patches:", shares))])
    return rows


def heat(image: Tensor, weights: Tensor) -> Tensor:
    """An image (3, H, W), uint8, in grey under weights (rows, columns); a colour bar on its right.

    The colours run from black at the map's own minimum over red and yellow to white at its maximum.
    """
    _, H, W = image.shape
    large = F.interpolate(weights[None, None], (H, W), mode="bicubic")[0, 0]
    # Bicubic curves swing beyond the values that they pass through
    strength = (large.clamp(weights.min(), weights.max()) - weights.min()) / (
        weights.max() - weights.min()
    ).clamp(min=1e-12)
    bar = torch.linspace(1, 0, H)[:, None].expand(H, max(1, W // 20))
    gap = torch.full((3, H, max(1, W // 40)), 255.0)
    heated = 0.45 * image.float().mean(0) + 0.55 * flame(strength)
    return torch.cat([heated, gap, flame(bar)], 2).to(torch.uint8)


def flame(strength: Tensor) -> Tensor:
    """(H, W) from 0 to 1 -> colours (3, H, W) from 0 to 255."""
    return torch.stack([255 * (3 * strength - shift).clamp(0, 1) for shift in (0, 1, 2)])


# --- charts


def need_matplotlib() -> None:
    """Raise UserError where matplotlib is absent: before work whose result is to be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("charts need matplotlib, which is not installed: pip install matplotlib")


def chart(panels: list[dict], path: str | Path) -> None:
    """Panels side by side: `lines` {label: (x, y)}, and what else Axes.set takes.

    A label has one colour in all panels. `bands` {label: (x, low, high)} are filled, in the colour
    of the line of that name, else the first; a label as _name stays out of the legend. `marks`
    {label: x} are vertical.
    """
    need_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(panels), 3.8), layout="constrained")
    colours: dict[str, str] = {}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        rest = {name: value for name, value in panel.items() if name not in DRAWN}
        for label, (x, y) in panel["lines"].items():
            colour = colours.setdefault(label, f"C{len(colours)}")
            marker = "o" if len(x) < 30 else None
            axes.plot(x, y, color=colour, marker=marker, markersize=4, label=label)
        for label, (x, low, high) in panel.get("bands", {}).items():
            colour = colours.get(label.removeprefix("_"), "C0")
            axes.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0, label=label)
        for label, x in panel.get("marks", {}).items():
            axes.axvline(x, color="grey", linestyle=":", linewidth=1)
            top = {"xycoords": ("data", "axes fraction"), "va": "bottom"}
            axes.annotate(label, (x, 1), fontsize=8, **top)
        axes.set(**rest)
        plain_axes(axes)
        axes.grid(alpha=0.3)
        if len(panel["lines"]) + len(panel.get("bands", {})) > 1:
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
            axes.legend(**below, ncols=3, fontsize=8, frameon=False)
    save(lambda path: figure.savefig(path, dpi=120), path)


DRAWN = ("lines", "bands", "marks")  # of a panel; the rest is for Axes.set


def plain_axes(axes) -> None:
    """Ticks as 0.01 or 20, not as powers; and no axis below 0 where no value is."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for axis, low in ((axes.xaxis, axes.dataLim.x0), (axes.yaxis, axes.dataLim.y0)):
        first, last = axis.get_view_interval()
        if axis.get_scale() == "log":
            subs = (1, 2, 5) if last < 300 * first else (1,)
            axis.set_major_locator(LogLocator(subs=subs))
            axis.set_minor_locator(NullLocator())
        elif low >= 0 > first:
            axis.set_view_interval(0, last, ignore=True)
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value, 12):g}"))


def size_chart(series: dict[str, list[dict]], path: str | Path) -> None:
    """mAP over non-zero parameters, as Fig. 1: a line for each label's rows of prune.py."""
    lines = {
        label: ([row["params"] / 1e6 for row in rows], [100 * row["mAP"] for row in rows])
        for label, rows in series.items()
    }
    axes = {"xlabel": "non-zero parameters (millions)", "ylabel": "mAP (%)"}
    chart([{"lines": lines, **axes}], path)


def cmc_panel(cmc: Tensor) -> dict:
    """The cumulative match characteristic, from rank 1 on."""
    lines = {"CMC": (list(range(1, len(cmc) + 1)), (100 * cmc).tolist())}
    axes = {"xlabel": "rank", "ylabel": "queries with a match so far (%)", "ylim": (0, 102)}
    return {"lines": lines, **axes}


# --- the curves of a run

FLOOR = 1e-4  # of the largest loss: FFD's triplet loss would stretch the axis to 1e-30
LOSSES = {  # label -> name in the log, option that holds its weight
    "alpha x triplet": ("triplet", "alpha"),
    "beta x center": ("center", "beta"),
    "gamma x cross-entropy": ("cross_entropy", "gamma"),
    "each sensor's own": ("modality", "modality_losses"),
}


def curves(folder: Path) -> Path:
    """Draw FOLDER/curves.png: losses, learning rate, gradient norm, and a validation's mAP."""
    chart(training_panels(folder), folder / "curves.png")
    return folder / "curves.png"


def training_panels(folder: Path) -> list[dict]:
    """Panels for `chart`, from a run's config.json and log.jsonl.

    Raises UserError where these are missing, or not those of a run.
    """
    try:
        settings = json.loads((folder / "config.json").read_text())
        events = list(map(json.loads, (folder / "log.jsonl").read_text().splitlines()))
        steps = [event for event in events if event["event"] == "step"]
        scores = [
            100 * event["validation"]["mAP"]
            for event in events
            if event["event"] == "epoch" and "validation" in event
        ]
        panels = panels_of(steps, settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: expected the folder of a run of train.py that has logged a step ({error})"
        ) from None
    if scores:
        lines = {"mAP": (list(range(1, len(scores) + 1)), scores)}
        panels.append({"lines": lines, "xlabel": "epoch", "ylabel": "validation mAP (%)"})
    return panels


def panels_of(steps: list[dict], settings: dict) -> list[dict]:
    x, marks, before = [], {}, 0
    for i, step in enumerate(steps):
        if i and step["stage"] != steps[i - 1]["stage"]:
            number = step["stage"]  # prune.py's rounds follow the two stages
            before = marks[f"stage {number}" if number < 3 else f"round {number - 2}"] = x[-1]
        x.append(before + step["step"])
    losses = {"loss": (x, [step["loss"] for step in steps])}
    top = max(losses["loss"][1])
    for label, (name, option) in LOSSES.items():
        weights = settings.get(option, 0.0)
        weights = weights if isinstance(weights, list) else [weights] * 2  # of stages 1 and 2
        # Weighted, the parts add up to the loss, and show what trains the model
        y = [weights[step["stage"] > 1] * step.get(name, 0.0) for step in steps]
        if any(y):
            losses[label if max(y) > FLOOR * top else f"{label}: below the axis"] = (x, y)
    axes = {"xlabel": "step", "marks": marks}
    limits = {"yscale": "log", "ylim": (FLOOR * top, 1.5 * top)}
    rates, norms = ([step[name] for step in steps] for name in ("lr", "gradient_norm"))
    return [
        {"lines": losses, "ylabel": "mean loss, weighted", **limits, **axes},
        {"lines": {"rate": (x, rates)}, "ylabel": "learning rate", **axes},
        {"lines": {"norm": (x, norms)}, "ylabel": "gradient norm", "yscale": "log", **axes},
    ]


# --- command line


@runtime.program
def main() -> None:
    parser = evaluate.make_parser(__doc__, prog="python -m extras.pictures")
    text = "write RUN/report.html instead: metrics, charts, ranked lists, attention, settings"
    parser.add_argument("--html", action="store_true", help=text)
    text = "random seed of the queries that are shown"
    parser.add_argument("--seed", metavar="N", type=runtime.whole(0), default=0, help=text)
    args = parser.parse_args()
    folder = runtime.checkpoint_file(args.checkpoint).parent
    if args.html:
        from extras import page

        print(f"{page.write(args, folder)}: metrics, charts, ranked lists, failures, settings")
    else:
        print(f"{curves(folder)}: losses, learning rate, gradient norm")


if __name__ == "__main__":
    main()
