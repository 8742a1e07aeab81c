"""Pictures of a model and its rankings: sheets of photos by Pillow, charts by matplotlib.

python -m extras.pictures runs/synthetic            draws RUN/curves.png from RUN/log.jsonl
python -m extras.pictures runs/synthetic --html     puts everything on one page, RUN/report.html

evaluate.py draws its ranked lists, failures, attention maps, CMC curve and map by `draw`.
"""

import argparse
import importlib.util
import json
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
    "Percentages: its share on image patches; the rest is on the fusion token, CLS and the like.",
)


def check_queries(words: list[str], query: data.Split) -> None:
    """Raise UserError for a query that there is not."""
    names = [sample.name for sample in query.samples]
    for word in words:
        if word not in ("random", "best", "worst", *names):
            raise UserError(f"--queries {word}: no query has this name; one is {names[0]}")


def draw(args: argparse.Namespace, embedder: evaluate.Embedder, ranking: evaluate.Ranking) -> None:
    """Draw the pictures that evaluate.py's options name, and print a line for each."""
    ap, query = ranking.metrics.ap, ranking.query
    chosen = choose(args.queries, query, ap, args.seed)
    if args.ranked_list:
        key = "Green: the same identity. Red: another. The query's own camera is left out."
        sheet(ranked_list(ranking, chosen), query.modalities, args.ranked_list, (key,))
        print(f"{args.ranked_list}: {len(chosen)} queries with their ten best")
    if args.failures:
        key = "Red: the nearest samples of another identity. Green: the first right one."
        worst = choose(["worst"], query, ap, args.seed, 6)
        rows = ranked_list(ranking, worst, 6, failures=True)
        sheet(rows, query.modalities, args.failures, (key,))
        print(f"{args.failures}: the worst queries and what they were taken for")
    if args.cmc:
        chart([cmc_panel(ranking.metrics.cmc)], args.cmc)
        print(f"{args.cmc}: the CMC curve")
    if args.attention:
        rows = attention(embedder, query, [i for i, _ in chosen])
        sheet(rows, query.modalities, args.attention, ATTENTION)
        print(f"{args.attention}: where the fusion token attends")
    if args.map:
        tsne = runtime.imported("extras.tsne")  # it draws with this module
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
    cells = [cell for row in rows for cell in row]
    shapes = [image.shape for cell in cells for image in cell.images.values()]
    width = max(round(HEIGHT * W / H) for _, H, W in shapes)
    texts = [font.getlength(line) for cell in cells for line in cell.lines]
    cell_width = round(max(width + 2 * FRAME, *texts)) + GAP
    text_height = LINE * max(len(cell.lines) for cell in cells)
    frame_height = len(modalities) * HEIGHT + 2 * FRAME
    row_height = text_height + frame_height + 2 * GAP
    left = round(max(map(font.getlength, modalities))) + 2 * GAP
    row_widths = [left + len(row) * cell_width for row in rows]
    across = round(max(row_widths + [font.getlength(line) + 2 * GAP for line in key]))
    below = len(rows) * row_height + GAP
    picture = Image.new("RGB", (across, below + LINE * len(key) + GAP), "white")
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
        raise UserError(f"{path}: cannot be written ({error})") from None


def ranked_list(
    ranking: evaluate.Ranking, chosen: Chosen, top: int = 10, failures: bool = False
) -> list[list[Cell]]:
    """Queries with the `top` gallery samples nearest to them, ranked as the metric ranks.

    With `failures`, the nearest wrong ones, and behind them the first right one.
    """
    query, gallery = ranking.query, ranking.gallery
    rows = []
    for i, reason in chosen:
        similarity = ranking.similarities(i, i + 1)[0]
        order = similarity.argsort(descending=True)
        same_pid = gallery.pids[order] == query.pids[i]
        same_key = gallery.keys[order] == query.keys[i]
        order = order[~(same_pid & same_key)]
        right = gallery.pids[order] == query.pids[i]
        ranks = list(range(len(order)))[:top]
        if failures:
            wrong = (~right).nonzero()[:, 0].tolist()
            ranks = [*wrong[:top], int(right.nonzero()[0])]
        lines = (short_name(query.samples[i]), f"{reason}, AP {100 * ranking.metrics.ap[i]:.1f}%")
        row = [Cell(query[i][0], lines)]
        for rank in ranks:
            j = int(order[rank])
            name = f"{rank + 1}. {short_name(gallery.samples[j])}"
            lines = (name, f"similarity {similarity[j]:.3f}")
            row.append(Cell(gallery[j][0], lines, RIGHT if right[rank] else WRONG))
        rows.append(row)
    return rows


def short_name(sample: data.Sample) -> str:
    return sample.name.rpartition("/")[2]  # holds identity and camera, as the data set writes them


def attention(
    embedder: evaluate.Embedder, split: data.Split, chosen: list[int]
) -> list[list[Cell]]:
    """Samples of a split, each beside a map of the fusion token's attention in every encoder."""
    rows = []
    for i in chosen:
        images, _, _ = split[i]
        batch = {name: image[None].to(embedder.device) for name, image in images.items()}
        maps = embedder.model.attention(embedder.normalise(batch))
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
    low, high = weights.min(), weights.max()
    strength = (large.clamp(low, high) - low) / (high - low).clamp(min=1e-12)
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
        raise UserError("charts need matplotlib: pip install matplotlib")


def chart(panels: list[dict], path: str | Path) -> None:
    """Write panels side by side, see `figure`."""
    need_matplotlib()
    save(lambda path: figure(panels).savefig(path, dpi=120), path)


def figure(panels: list[dict], width: float = 5.0):
    """A matplotlib figure of panels: `lines` {label: (x, y)}, and what else Axes.set takes.

    A label has one colour in all panels. `bands` {label: (x, low, high)} are filled, in the colour
    of the line of that name, else the first; a label as _name stays out of the legend. `marks`
    {label: x} are vertical. `width` of a panel in inches.
    """
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width * len(panels), 3.8), layout="constrained")
    colours: dict[str, str] = {}
    row = drawn.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(row, panels, strict=True):
        lines, bands = panel["lines"], panel.get("bands", {})
        for label, (x, y) in lines.items():
            colour = colours.setdefault(label, f"C{len(colours)}")
            axes.plot(x, y, color=colour, marker="o" if len(x) < 30 else None, label=label)
        for label, (x, low, high) in bands.items():
            colour = colours.get(label.removeprefix("_"), "C0")
            axes.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0, label=label)
        for label, x in panel.get("marks", {}).items():
            axes.axvline(x, color="grey", linestyle=":")
            axes.annotate(label, (x, 1), xycoords=("data", "axes fraction"), va="bottom")
        others = ("lines", "bands", "marks")
        axes.set(**{name: value for name, value in panel.items() if name not in others})
        plain_axes(axes)
        axes.grid(alpha=0.3)
        if len(lines) + len(bands) > 1:
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
            axes.legend(**below, ncols=2 if width >= 5 else 1, frameon=False)
    return drawn


def plain_axes(axes) -> None:
    """Ticks as 0.01 or 20, not as powers; and no axis below 0 where no value is."""
    from matplotlib.ticker import LogLocator, NullLocator

    for axis, low in ((axes.xaxis, axes.dataLim.x0), (axes.yaxis, axes.dataLim.y0)):
        first, last = axis.get_view_interval()
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if last < 300 * first else (1,)))
            axis.set_minor_locator(NullLocator())
        elif low >= 0 > first:
            axis.set_view_interval(0, last, ignore=True)
        axis.set_major_formatter(lambda value, _: f"{round(value, 12):g}")


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


def training_panels(folder: Path) -> list[dict]:
    """Panels of losses, learning rate, gradient norm and a validation's mAP, from a run's files.

    Raises UserError where these are missing, or not those of a run.
    """
    try:
        settings = json.loads((folder / "config.json").read_text())
        events = list(map(json.loads, (folder / "log.jsonl").read_text().splitlines()))
        panels = panels_of([event for event in events if event["event"] == "step"], settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: expected the folder of a run that has logged a step ({error})"
        ) from None
    scores = [100 * event["validation"]["mAP"] for event in events if "validation" in event]
    if scores:
        lines = {"mAP": (list(range(1, len(scores) + 1)), scores)}
        panels.append({"lines": lines, "xlabel": "epoch", "ylabel": "validation mAP (%)"})
    return panels


def panels_of(steps: list[dict], settings: dict) -> list[dict]:
    x, marks, before = [], {}, 0
    for i, step in enumerate(steps):
        number = step["stage"]
        if i and number != steps[i - 1]["stage"]:
            # prune.py's rounds follow the two stages
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
            losses[label] = (x, y)
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
        page = runtime.imported("extras.page")  # it draws with this module
        print(f"{page.write(args, folder)}: metrics, charts, ranked lists, failures, settings")
    else:
        chart(training_panels(folder), folder / "curves.png")
        print(f"{folder / 'curves.png'}: losses, learning rate, gradient norm")


if __name__ == "__main__":
    main()
