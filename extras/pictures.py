"""Pictures of a model and its rankings: sheets of photos by Pillow, charts by matplotlib.

python -m extras.pictures runs/synthetic            draws RUN/curves.png from RUN/log.jsonl
python -m extras.pictures runs/synthetic --html     puts everything on one page, RUN/report.html
"""

import argparse
import importlib.util
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import data
import evaluate
import runtime
from extras import tsne
from model import GraFT
from runtime import UserError

# Frames: right and wrong are the same identity and another; a match is above the threshold,
# whatever it shows
RIGHT, WRONG, MATCH, PLAIN = (0, 150, 60), (210, 30, 30), (30, 90, 220), (90, 90, 90)
ABSENT = (215, 215, 215)  # where a sample lacks a sensor
HEIGHT, GAP, FRAME, LINE = 72, 8, 4, 16  # pixels: of an image, between cells, a frame, a text line

# --- what evaluate.py draws

OPTIONS = {  # name -> what it draws, and the packages that it needs
    "ranked_list": ("queries with the ten gallery samples most similar to each",),
    "failures": ("the worst queries with their wrong matches",),
    "attention": ("where the fusion token attends (GraFT)",),
    "cmc": ("the CMC curve", "matplotlib"),
    "map": ("t-SNE of gallery samples, one colour per identity", "matplotlib", "scikit-learn"),
}
RANKED = "Green: the same identity. Red: another one. The query's own camera is left out."
FAILURES = "Red: the most similar samples of other identities. Green: the first correct match."
ATTENTION = (
    "Each map runs from its own lowest attention (black) to its highest (white).",
    "Percentages: how much of the fusion token's attention is on the image patches;",
    "the rest is on the fusion token itself, on CLS, and on other tokens that are no patches.",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("pictures").add_argument
    for name, (text, *packages) in OPTIONS.items():
        text += f" (needs {', '.join(packages)})" if packages else ""
        add("--" + name.replace("_", "-"), type=Path, metavar="FILE", help=text)
    text = "which queries to draw: random, best, worst (two of each), or names"
    add("--queries", nargs="+", default=["random", "best", "worst"], metavar="Q", help=text)
    text = "random seed of the random queries and of --map"
    add("--seed", metavar="N", type=runtime.whole(0), default=0, help=text)


def check(args: argparse.Namespace) -> None:
    """Raise UserError for pictures that could not be written, or show more than one ranking."""
    wanted = [name for name in OPTIONS if getattr(args, name)]
    for name in wanted:
        option = "--" + name.replace("_", "-")
        runtime.check_output(getattr(args, name), option, (".png", ".jpg", ".jpeg"))
        need(*OPTIONS[name][1:])
    if wanted and (args.all_subsets or "RANK" in os.environ):
        raise UserError(
            "pictures show a single ranking: draw them without --all-subsets and without torchrun"
        )


def check_subjects(
    args: argparse.Namespace, embedder: evaluate.Embedder, query: data.Split
) -> None:
    """Raise UserError for an unknown query, or a model without the attention that is asked for."""
    names = [sample.name for sample in query.samples]
    for word in args.queries:
        if word not in ("random", "best", "worst", *names):
            raise UserError(f"--queries {word}: no query has this name; one is {names[0]}")
    if args.attention and not isinstance(embedder.model, GraFT):
        fusion = embedder.model.config.fusion
        raise UserError(f"--attention: a model with --fusion {fusion} has no fusion tokens")


def draw(args: argparse.Namespace, embedder: evaluate.Embedder, ranking: evaluate.Ranking) -> None:
    """Draw the pictures that evaluate.py's options name, and print a line for each."""
    ap, query = ranking.metrics.ap, ranking.query
    chosen = choose(args.queries, query, ap, args.seed)
    # Of a re-ranking this is what sorts; it has no cosines
    note = ("Similarity: minus the re-ranked distance.",) if args.rerank else ()
    if args.ranked_list:
        key = (RANKED, *note)
        sheet(ranked_list(ranking, chosen), query.modalities, args.ranked_list, key)
    if args.failures:
        worst, key = choose(["worst"], query, ap, args.seed, 6), (FAILURES, *note)
        rows = ranked_list(ranking, worst, 6, failures=True)
        sheet(rows, query.modalities, args.failures, key)
    if args.attention:
        rows = attention(embedder, query, [i for i, _ in chosen])
        sheet(rows, query.modalities, args.attention, ATTENTION)
    if args.cmc:
        chart([cmc_panel(ranking.metrics.cmc)], args.cmc)
    if args.map:
        print("drawing the map ...", flush=True)  # t-SNE takes a minute
        tsne.draw(embedder, ranking.gallery, args.map, args.seed)
    for name, (text, *_) in OPTIONS.items():
        if path := getattr(args, name):
            print(f"{path}: {text}")


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

    `key`: lines of text below the rows.
    """
    font = ImageFont.load_default(12)
    cells = [cell for row in rows for cell in row]
    shapes = [image.shape for cell in cells for image in cell.images.values()]
    width = max(round(HEIGHT * W / H) for _, H, W in shapes)
    widest = max(font.getlength(line) for cell in cells for line in cell.lines)
    cell_width = round(max(width + 2 * FRAME, widest)) + GAP
    text_height = LINE * max(len(cell.lines) for cell in cells)
    frame_height = len(modalities) * HEIGHT + 2 * FRAME
    row_height = text_height + frame_height + 2 * GAP
    left = round(max(map(font.getlength, modalities))) + 2 * GAP
    key_widths = [font.getlength(line) + 2 * GAP for line in key]
    across = round(max([left + max(map(len, rows)) * cell_width, *key_widths]))
    below = len(rows) * row_height + GAP
    picture = Image.new("RGB", (across, below + LINE * len(key) + GAP), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((GAP, below), "\n".join(key), "black", font)
    for r, row in enumerate(rows):
        top = GAP + r * row_height + text_height
        for m, modality in enumerate(modalities):
            pen.text((GAP, top + FRAME + m * HEIGHT + HEIGHT // 2 - 8), modality, "black", font)
        for c, cell in enumerate(row):
            x = left + c * cell_width
            pen.text((x, top - text_height), "\n".join(cell.lines), "black", font)
            box = (x, top, x + width + 2 * FRAME - 1, top + frame_height - 1)
            pen.rectangle(box, "white", cell.colour, FRAME)
            for m, modality in enumerate(modalities):
                image = Image.new("RGB", (width, HEIGHT), ABSENT)
                if modality in cell.images:
                    image = fit(cell.images[modality])
                offset = FRAME + (width - image.width) // 2
                picture.paste(image, (x + offset, top + FRAME + m * HEIGHT))
    picture.save(path)


def fit(image: Tensor) -> Image.Image:
    """An image (3, H, W), uint8, at a sheet's height."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    width = max(1, round(HEIGHT * picture.width / picture.height))
    return picture.resize((width, HEIGHT), Image.Resampling.LANCZOS)


def ranked_list(
    ranking: evaluate.Ranking, chosen: Chosen, top: int = 10, failures: bool = False
) -> list[list[Cell]]:
    """Queries with the `top` gallery samples most similar to them, ranked as the metric ranks.

    With `failures`, only samples of other identities, and behind them the first match.
    """
    query, gallery = ranking.query, ranking.gallery
    rows = []
    for i, reason in chosen:
        similarity = ranking.similarities(i, i + 1)[0]
        order = similarity.argsort(descending=True)
        same_pid = gallery.pids[order] == query.pids[i]
        same_key = gallery.keys[order] == query.keys[i]
        order = order[~(same_pid & same_key)]
        is_match = gallery.pids[order] == query.pids[i]
        ranks = list(range(min(top, len(order))))
        if failures:
            wrong = (~is_match).nonzero()[:top, 0]
            ranks = [*wrong.tolist(), int(is_match.nonzero()[0])]
        lines = (short_name(query.samples[i]), f"{reason}, AP {100 * ranking.metrics.ap[i]:.1f}%")
        row = [Cell(query[i][0], lines)]
        for rank in ranks:
            j = int(order[rank])
            name = f"{rank + 1}. {short_name(gallery.samples[j])}"
            lines = (name, f"similarity {similarity[j]:.3f}")
            row.append(Cell(gallery[j][0], lines, RIGHT if is_match[rank] else WRONG))
        rows.append(row)
    return rows


def short_name(sample: data.Sample) -> str:
    return sample.name.rpartition("/")[2]  # holds identity and camera, as the data set writes them


@torch.no_grad()
def attention_maps(model: GraFT, images: dict[str, Tensor]) -> dict[str, Tensor]:
    """The fusion tokens' attention in each modality's encoder (Fig. 4): (B, rows, columns).

    `images` are normalised. The maps are means over heads and fusion tokens. They add up to less
    than 1: the rest of the attention is on the fusion tokens and on the tokens before the patches.
    """
    maps = {}
    first_patch = model.config.fusion_tokens + model.backbone.prefix_tokens
    for modality, data_tokens in model.extract(images).items():
        fusion_tokens = model.fusion_token.expand(len(data_tokens), -1, -1)
        tokens = torch.cat([fusion_tokens, data_tokens], 1)
        _, weights = model.encoders[modality].self_attn(fusion_tokens, tokens, tokens)
        patches = weights.mean(1)[:, first_patch:]  # weights: (B, L, L + N), the heads' mean
        maps[modality] = patches.unflatten(1, model.backbone.grid)
    return maps


def attention(
    embedder: evaluate.Embedder, split: data.Split, chosen: list[int]
) -> list[list[Cell]]:
    """Samples of a split, each beside a map of the fusion token's attention in every encoder."""
    rows, config = [], embedder.model.config
    border = (config.patch_size - (config.stride or config.patch_size)) // 2
    for i in chosen:
        images, _, _ = split[i]
        batch = {name: image[None].to(embedder.device) for name, image in images.items()}
        maps = attention_maps(embedder.model, embedder.normalise(batch))
        maps = {modality: weights[0].float().cpu() for modality, weights in maps.items()}
        heated = {name: heat(image, maps[name], border) for name, image in images.items()}
        shares = ", ".join(f"{name} {100 * weights.sum():.0f}%" for name, weights in maps.items())
        sample = Cell(images, (short_name(split.samples[i]), ""))
        rows.append([sample, Cell(heated, ("attention on the patches:", shares))])
    return rows


def heat(image: Tensor, weights: Tensor, border: int = 0) -> Tensor:
    """An image (3, H, W), uint8, in grey under weights (rows, columns); a colour bar on its right.

    `border`: pixels by which the outer patches reach beyond half of the way to their neighbours,
    where patches overlap.

    The colours run from black at the map's own minimum over red and yellow to white at its maximum.
    """
    _, H, W = image.shape
    inner = F.interpolate(weights[None, None], (H - 2 * border, W - 2 * border), mode="bicubic")
    large = F.pad(inner, [border] * 4, mode="replicate")[0, 0]
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


def need(*packages: str) -> None:
    """Raise UserError where a package is absent: before work whose result is to be drawn."""
    for package in packages:
        if not importlib.util.find_spec({"scikit-learn": "sklearn"}.get(package, package)):
            raise UserError(f"this picture needs {package}: pip install {package}")


def chart(panels: list[dict], path: str | Path) -> None:
    """Write panels side by side, see `figure`."""
    need("matplotlib")
    figure(panels).savefig(path, dpi=120)


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
        axis.set_major_formatter(lambda x, _: np.format_float_positional(round(x, 12), trim="-"))


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
    "alpha x contrastive": ("contrastive", "alpha"),  # these of --fusion weighted
    "gamma x cross-entropy of each sensor": ("sensors", "gamma"),
    "confidence": ("confidence", ""),
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
    """Panels of losses, learning rate and gradient norm, from the steps that a log holds."""
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
        weights = settings.get(option, 0.0) if option else 1.0
        weights = weights if isinstance(weights, list) else [weights] * 2  # of stages 1 and 2
        # Weighted, the parts add up to the loss, and show what trains the model
        y = np.array([weights[step["stage"] > 1] * step.get(name, 0.0) for step in steps])
        if y.any():
            losses[label] = (x, np.where(y > 0, y, np.nan))  # a gap where the loss is not used
    axes = {"xlabel": "step", "marks": marks}
    low = max(FLOOR * top, min(np.nanmin(y) for _, y in losses.values()) / 1.5)
    limits = {"yscale": "log", "ylim": (low, 1.5 * top)}
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
    text = "write RUN/report.html: metrics, sensor subsets, charts, ranked lists, failures"
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
