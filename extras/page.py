"""A run on one HTML page: figures, curves, CMC, ranked lists, failures, attention, settings.

`python -m extras.pictures RUN --html` writes it. The page holds everything itself, its pictures and
charts too, and follows the reader's colour scheme.
"""

import argparse
import base64
import io
import math
from html import escape
from pathlib import Path

import torch

import data
import evaluate
import runtime
from extras import pictures
from extras.pictures import Cell
from runtime import UserError

WIDTH, HEIGHT, LEFT, BOTTOM = 460, 230, 48, 22  # of a chart, and its margins
FLOOR = 1e-4  # of the largest value: what a logarithmic axis still shows

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c1c1c; --soft: #666; --line: #ddd;
  --right: #00963c; --wrong: #d21e1e; --c0: #2563eb; --c1: #c2410c; --c2: #15803d; --c3: #7e22ce; }
@media (prefers-color-scheme: dark) { :root { --back: #16181b; --text: #e6e6e6; --soft: #a0a0a0;
  --line: #3a3d42; --right: #35c26e; --wrong: #ff6b6b; --c0: #60a5fa; --c1: #fb923c; --c2: #4ade80;
  --c3: #c084fc; } }
body { background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif;
  max-width: 68rem; margin: 0 auto; padding: 1rem; }
h2 { margin: 2.2rem 0 .4rem; font-size: 1.2rem; }
p, figcaption, th, .keys { color: var(--soft); }
.cards { display: flex; flex-wrap: wrap; gap: .5rem 2rem; }
.cards b { display: block; font-size: 1.9rem; line-height: 1.2; }
.charts { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); }
svg { width: 100%; height: auto; font-size: 11px; fill: var(--soft); }
svg path { fill: none; stroke: var(--line); }
svg polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.keys span { margin-right: 1rem; white-space: nowrap; }
.keys i { display: inline-block; width: .8rem; height: .2rem; margin-right: .3rem;
  vertical-align: middle; }
.row { display: flex; gap: .5rem; overflow-x: auto; padding: .3rem 0 .6rem; }
figure { margin: 0; flex: none; font-size: .75rem; }
figure div { border: 4px solid var(--soft); border-radius: 4px; overflow: hidden;
  width: fit-content; }
figure.right div { border-color: var(--right); }
figure.wrong div { border-color: var(--wrong); }
figure img { display: block; }
figcaption { max-width: 11rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
td, th { text-align: left; padding: .15rem 1rem .15rem 0; border-bottom: 1px solid var(--line); }
td { overflow-wrap: anywhere; }
"""


def write(args: argparse.Namespace) -> Path:
    """RUN/report.html, from RUN/last.pt, RUN/log.jsonl and the data set."""
    log = pictures.read_log(args.run / "log.jsonl")  # first: a mistake is found before the work
    args.checkpoint = args.run / "last.pt"
    device = runtime.start(args.device)
    embedder, checkpoint = evaluate.load_embedder(args.checkpoint, device)
    settings = checkpoint["settings"]
    evaluate.fill_from_training(args, settings)
    config = embedder.model.config
    if unknown := set(args.modalities) - set(config.modalities):
        trained = ",".join(config.modalities)
        raise UserError(f"--modalities {','.join(unknown)}: the model was trained on {trained}")
    embedder.precision, embedder.workers = args.precision, args.workers
    source = (args.dataset, args.data_root, args.modalities, config.image_size, args.store)
    dataset = data.load_dataset(*source, ranges=args.range)
    rankings = rank_subsets(embedder, dataset.query, dataset.gallery)
    ranking = rankings[dataset.modalities]
    figures = {s: evaluate.figures(embedder.model, r) for s, r in rankings.items()}
    sections = [
        head(args.run.resolve().name, figures[dataset.modalities], settings),
        sensors(figures),
        charts(log, ranking.metrics.cmc),
        *queries(embedder, ranking, args.seed),
        settings_table(settings),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(args.run.resolve().name)}</title><style>{STYLE}</style>\n"
        + "\n".join(sections)
        + "</html>\n"
    )
    path = args.run / "report.html"
    runtime.write_atomically(path, lambda temporary: temporary.write_text(page, "utf-8"))
    return path


def rank_subsets(
    embedder: evaluate.Embedder, query: data.Split, gallery: data.Split
) -> dict[tuple[str, ...], evaluate.Ranking]:
    """Rank by all sensors, and by some: the images are embedded once, as means are cheap."""
    names = query.modalities
    if embedder.model.config.fusion not in pictures.OWN_TOKENS:
        return {names: evaluate.rank_splits(embedder, query, gallery)}
    embedded = [(split, *pictures.own_tokens(embedder, split)) for split in (query, gallery)]
    rankings = {}
    for subset in subsets(names):
        chosen = torch.tensor([name in subset for name in names])
        both = []
        for split, own, present in embedded:
            present = present & chosen
            some = present.any(1)  # as evaluate.py: what has none of these sensors is left out
            rows = split.subset([split.samples[i] for i in some.nonzero()[:, 0].tolist()])
            both.append((rows, pictures.mean_features(embedder, own[some], present[some])))
        rankings[subset] = evaluate.rank_features(*both)
    return rankings


def subsets(modalities: tuple[str, ...]) -> list[tuple[str, ...]]:
    """All of them, each left out, each alone."""
    without = [tuple(m for m in modalities if m != left_out) for left_out in modalities]
    alone = [(modality,) for modality in modalities]
    return [subset for subset in dict.fromkeys([modalities, *without, *alone]) if subset]


# --- sections


def head(name: str, metrics: dict, settings: dict) -> str:
    cards = "".join(
        f"<span>{figure}<b>{100 * metrics[figure]:.1f}</b></span>"
        for figure in ("mAP", "R1", "R5", "R10", "mINP")
    )
    about = (
        f"{settings.get('fusion', '')} on {settings.get('dataset', '')};"
        f" {metrics['params'] / 1e6:.2f} M parameters; {metrics['num_valid']} queries with a match,"
        f" of {metrics['num_query']}; {metrics['num_gallery']} gallery samples. Figures in percent."
    )
    return f'<h1>{escape(name)}</h1><div class="cards">{cards}</div><p>{escape(about)}</p>'


def sensors(figures: dict[tuple[str, ...], dict]) -> str:
    if len(figures) == 1:
        return ""
    rows = [["sensors", "mAP", "R1", "R5", "R10"]]
    for subset, metrics in figures.items():
        shown = [f"{100 * metrics[name]:.1f}" for name in rows[0][1:]]
        rows.append([" + ".join(subset), *shown])
    return "<h2>With some of the sensors</h2>" + table(rows)


def charts(log: tuple[list[dict], list[dict]], cmc) -> str:
    steps, epochs = log
    first = max([step["step"] for step in steps if step["stage"] == 1], default=0)
    x = [step["step"] + (first if step["stage"] == 2 else 0) for step in steps]
    losses = {name: (x, [step[name] for step in steps]) for name in pictures.LOSSES}
    mark = first if pictures._both(steps) else None
    drawn = [
        line_chart(
            "queries with a match by rank (%)", {"CMC": (range(1, len(cmc) + 1), 100 * cmc)}
        ),
        line_chart("mean loss by step", losses, True, mark),
    ]
    for name in ("lr", "gradient_norm"):
        lines = {name.replace("_", " "): (x, [step[name] for step in steps])}
        drawn.append(line_chart(f"{next(iter(lines))} by step", lines, True, mark))
    scores = [100 * epoch["validation"]["mAP"] for epoch in epochs if "validation" in epoch]
    if scores:
        lines = {"mAP": (range(1, len(scores) + 1), scores)}
        drawn.append(line_chart("validation mAP by epoch (%)", lines))
    return f'<h2>Ranking and training</h2><div class="charts">{"".join(drawn)}</div>'


def queries(embedder: evaluate.Embedder, ranking: evaluate.Ranking, seed: int) -> list[str]:
    """Ranked lists, failures, attention."""
    ap, names = ranking.metrics.ap, ranking.query.modalities
    chosen = pictures.choose(["random", "best", "worst"], ranking.query, ap, seed)
    order = "From top to bottom: " + ", ".join(names) + "."
    sections = [
        f"<h2>Queries and their ten best</h2><p>{escape(order)} ✓ right, ✗ wrong.</p>"
        + rows_of_cells(pictures.ranked_rows(ranking, chosen)),
        "<h2>Worst queries</h2><p>What they were taken for, and the first right one.</p>"
        + rows_of_cells(pictures.failure_rows(ranking, pictures.worst(ap))),
    ]
    if embedder.model.config.fusion == "graft":
        rows = pictures.attention_rows(embedder, ranking.query, [i for i, _ in chosen])
        sections.append(
            "<h2>Attention</h2><p>Where the fusion token looks, in each sensor's encoder.</p>"
            f'<div class="charts">{rows_of_cells(rows)}</div>'
        )
    return sections


def settings_table(settings: dict) -> str:
    rows = [[name, str(value)] for name, value in sorted(settings.items()) if name != "stages"]
    return f"<h2>Settings</h2><details><summary>all {len(rows)}</summary>{table(rows)}</details>"


# --- parts


def table(rows: list[list[str]]) -> str:
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


MARKS = {pictures.RIGHT: ("right", "✓ "), pictures.WRONG: ("wrong", "✗ ")}


def rows_of_cells(rows: list[list[Cell]]) -> str:
    return "".join(f'<div class="row">{"".join(map(figure, row))}</div>' for row in rows)


def figure(cell: Cell) -> str:
    """A sample: its sensors' images below one another, and its text."""
    kind, mark = MARKS.get(cell.colour, ("plain", ""))
    images = "".join(inlined(name, image) for name, image in cell.images.items())
    text = "<br>".join(map(escape, cell.lines))
    return (
        f'<figure class="{kind}"><div>{images}</div><figcaption>{mark}{text}</figcaption></figure>'
    )


def inlined(name: str, image) -> str:
    file, picture = io.BytesIO(), pictures.fit(image)
    picture.save(file, "JPEG", quality=88)
    content = base64.b64encode(file.getvalue()).decode()
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img {size} alt="{escape(name)}" src="data:image/jpeg;base64,{content}">'


def line_chart(title: str, lines: dict, log: bool = False, mark: float | None = None) -> str:
    """Lines {label: (x, y)} as SVG in the page's colours; `mark`: where stage 2 begins."""
    lines = {label: (list(map(float, x)), list(map(float, y))) for label, (x, y) in lines.items()}
    every_x = [value for x, _ in lines.values() for value in x]
    every_y = [value for _, y in lines.values() for value in y if math.isfinite(value)]
    top = max([*every_y, 0.0]) or 1.0
    lowest = max(min(every_y, default=0.0), top * FLOOR) if log else 0.0
    scale = math.log10 if log else float
    low, high = scale(lowest), scale(top)
    left, right = min(every_x), max(every_x)

    def place(x: float, y: float) -> tuple[float, float]:
        share = (scale(max(y, lowest)) - low) / ((high - low) or 1)
        across = (x - left) / ((right - left) or 1)
        return LEFT + across * (WIDTH - LEFT - 8), 10 + (1 - share) * (HEIGHT - BOTTOM - 10)

    parts = []
    for tick in ticks(lowest, top, log):
        _, y = place(left, tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - 8}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    for x, anchor in ((left, "start"), (right, "end")):
        across, _ = place(x, top)
        parts.append(f'<text x="{across:.0f}" y="{HEIGHT - 5}" text-anchor="{anchor}">{x:g}</text>')
    if mark is not None:
        across, _ = place(mark, top)
        parts.append(f'<path stroke-dasharray="3" d="M{across:.1f} 10V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{across + 4:.1f}" y="{HEIGHT - BOTTOM - 6}">stage 2</text>')
    keys = []
    for i, (label, (x, y)) in enumerate(lines.items()):
        points = " ".join(
            "{:.1f},{:.1f}".format(*place(*point))
            for point in zip(x, y, strict=True)
            if math.isfinite(point[1])
        )
        parts.append(f'<polyline style="stroke:var(--c{i % 4})" points="{points}"/>')
        keys.append(f'<span><i style="background:var(--c{i % 4})"></i>{escape(label)}</span>')
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
    below = f'<div class="keys">{"".join(keys)}</div>' if len(keys) > 1 else ""
    return f"<div><p>{escape(title)}</p>{svg}{''.join(parts)}</svg>{below}</div>"


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Some round numbers from `low` to `high`."""
    if log:
        decades = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
        return [10.0**power for power in decades] or [low, high]
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= 5)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]
