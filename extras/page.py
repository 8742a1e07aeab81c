"""A run on one HTML page: metrics, curves, CMC, ranked lists, failures, attention, settings.

`python -m extras.pictures RUN --html` writes it. The page holds everything itself, its pictures and
charts too, needs no network and follows the reader's colour scheme.
"""

import argparse
import base64
import io
import math
from html import escape
from pathlib import Path

import evaluate
import runtime
from extras import pictures
from extras.pictures import Cell

# Of a chart and its margins. A chart is never drawn narrower on a phone, so its text of 12 units
# is 12 pixels or more
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 340, 200, 48, 18, 22

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c1c1c; --soft: #666; --line: #ddd;
  --right: #00963c; --wrong: #d21e1e; --c0: #2563eb; --c1: #c2410c; --c2: #15803d; --c3: #7e22ce; }
@media (prefers-color-scheme: dark) { :root { --back: #16181b; --text: #e6e6e6; --soft: #a0a0a0;
  --line: #3a3d42; --right: #35c26e; --wrong: #ff6b6b; --c0: #60a5fa; --c1: #fb923c; --c2: #4ade80;
  --c3: #c084fc; } }
body { background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif;
  max-width: 68rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: clamp(1.3rem, 5vw, 2rem); line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 .4rem; font-size: 1.2rem; }
p, figcaption, th, .keys { color: var(--soft); }
.cards { display: flex; flex-wrap: wrap; gap: .5rem 2rem; }
.cards b { display: block; font-size: 1.9rem; line-height: 1.2; }
.charts { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); }
svg { width: 100%; max-width: 25rem; height: auto; font-size: 12px; fill: var(--soft); }
svg path { fill: none; stroke: var(--line); }
svg polyline { fill: none; stroke-width: 1.5; stroke-linejoin: round; }
.keys { font-size: .8rem; }
.keys span { margin-right: 1rem; white-space: nowrap; }
.keys i { display: inline-block; width: .8rem; height: .2rem; margin-right: .3rem;
  vertical-align: middle; }
.row { display: flex; gap: .5rem; overflow-x: auto; padding: .3rem 0 .6rem; }
.long { padding-right: 3rem; mask-image: linear-gradient(to left, #0000, #000 3rem); }
figure { margin: 0; flex: none; font-size: .75rem; }
figure div { border: 4px solid var(--soft); border-radius: 4px; overflow: hidden;
  width: fit-content; }
figure.right div { border-color: var(--right); }
figure.wrong div { border-color: var(--wrong); }
figure img { display: block; }
.absent { display: grid; place-items: center; box-sizing: border-box; color: var(--soft);
  border: 1px dashed var(--soft); }
figcaption { max-width: 11rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
td, th { text-align: left; padding: .15rem 1rem .15rem 0; border-bottom: 1px solid var(--line); }
details td { overflow-wrap: anywhere; }
"""


def write(args: argparse.Namespace, folder: Path) -> Path:
    """FOLDER/report.html, from the checkpoint and the log in it, and the data set."""
    panels = pictures.training_panels(folder)  # first: a mistake is found before the work
    embedder, dataset = evaluate.open_checkpoint(args)
    splits = dataset.query, dataset.gallery
    ranking = evaluate.rank_splits(embedder, *splits)
    metrics = {dataset.modalities: evaluate.metrics_dict(embedder.model, ranking)}
    for subset in subsets(dataset.modalities):
        parts = [split.restricted(subset) for split in splits]
        if all(map(len, parts)):
            parts = [(part, embedder.embed(part)) for part in parts]
            metrics[subset] = evaluate.metrics_dict(embedder.model, evaluate.rank_features(*parts))
    settings, whole = embedder.settings, metrics[dataset.modalities]
    title = (
        f"{folder.resolve().name}: {settings.get('fusion', 'graft')} on {args.dataset},"
        f" {' + '.join(dataset.modalities)}, {100 * whole['mAP']:.1f}% mAP"
    )
    sections = [
        head(title, whole),
        sensors(metrics),
        charts([pictures.cmc_panel(ranking.metrics.cmc), *panels]),
        *queries(embedder, ranking, args.seed),
        settings_table(settings),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>\n"
        + "\n".join(sections)
        + "</html>\n"
    )
    path = folder / "report.html"
    runtime.write_atomically(path, lambda temporary: temporary.write_text(page, "utf-8"))
    return path


def subsets(modalities: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Each sensor left out, then each alone."""
    without = [tuple(m for m in modalities if m != left_out) for left_out in modalities]
    alone = [(modality,) for modality in modalities]
    return [s for s in dict.fromkeys([*without, *alone]) if s and s != modalities]


# --- sections


def head(title: str, metrics: dict) -> str:
    cards = "".join(
        f"<span>{name}<b>{100 * metrics[name]:.1f}</b></span>"
        for name in ("mAP", "R1", "R5", "R10", "mINP")
    )
    about = (
        f"In percent. {metrics['num_valid']} of {metrics['num_query']} queries have a match among"
        f" {metrics['num_gallery']} gallery samples. {metrics['params'] / 1e6:.2f} M parameters."
    )
    return f'<h1>{escape(title)}</h1><div class="cards">{cards}</div><p>{about}</p>'


def sensors(metrics: dict[tuple[str, ...], dict]) -> str:
    if len(metrics) == 1:
        return ""
    rows = [["sensors in testing", "mAP", "R1", "R5", "R10"]]
    for subset, values in metrics.items():
        shown = [f"{100 * values[name]:.1f}" for name in rows[0][1:]]
        rows.append([" + ".join(subset), *shown])
    return "<h2>With some of the sensors</h2>" + table(rows)


def charts(panels: list[dict]) -> str:
    drawn = "".join(map(line_chart, panels))
    return f'<h2>Ranking and training</h2><div class="charts">{drawn}</div>'


def queries(embedder: evaluate.Embedder, ranking: evaluate.Ranking, seed: int) -> list[str]:
    """Ranked lists, failures, attention."""
    query, ap, names = ranking.query, ranking.metrics.ap, ranking.query.modalities
    chosen = pictures.choose(["random", "best", "worst"], query, ap, seed)
    worst = pictures.choose(["worst"], query, ap, seed, 6)
    sensors = f"From top to bottom: {escape(', '.join(names))}."
    sections = [
        f"<h2>Queries and their ten best</h2><p>{sensors} ✓ the same identity, ✗ another."
        " Scroll a row sideways for the rest →</p>"
        + rows_of_cells(pictures.ranked_list(ranking, chosen), names, "row long"),
        "<h2>Worst queries</h2><p>What they were taken for, and at the end the first right one."
        " Scroll sideways →</p>"
        + rows_of_cells(pictures.failures(ranking, worst), names, "row long"),
    ]
    if embedder.model.config.fusion == "graft":
        rows = pictures.attention(embedder, query, [i for i, _ in chosen])
        sections.append(
            "<h2>Attention</h2><p>Where the fusion token looks, in each sensor's encoder."
            f" {' '.join(pictures.ATTENTION)}</p>"
            f'<div class="charts">{rows_of_cells(rows, names, "row")}</div>'
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


def rows_of_cells(rows: list[list[Cell]], names: tuple[str, ...], kind: str) -> str:
    figures = ["".join(figure(cell, names) for cell in row) for row in rows]
    return "".join(f'<div class="{kind}">{row}</div>' for row in figures)


def figure(cell: Cell, names: tuple[str, ...]) -> str:
    """A sample: its sensors' images below one another, empty where it lacks one, and its text."""
    kind, mark = MARKS.get(cell.colour, ("plain", ""))
    images = {name: pictures.fit(image) for name, image in cell.images.items()}
    width = max(image.width for image in images.values())
    size = f"width:{width}px;height:{pictures.HEIGHT}px"
    parts = [
        inlined(name, images[name])
        if name in images
        else f'<span class="absent" style="{size}">no {escape(name)}</span>'
        for name in names
    ]
    text = "<br>".join(map(escape, cell.lines))
    return (
        f'<figure class="{kind}"><div>{"".join(parts)}</div>'
        f"<figcaption>{mark}{text}</figcaption></figure>"
    )


def inlined(name: str, picture) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88)
    content = base64.b64encode(file.getvalue()).decode()
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img {size} alt="{escape(name)}" src="data:image/jpeg;base64,{content}">'


def line_chart(panel: dict) -> str:
    """A panel of pictures.chart as SVG in the page's colours."""
    lines, log = panel["lines"], panel.get("yscale") == "log"
    points = [point for x, y in lines.values() for point in zip(x, y, strict=True)]
    every_x, every_y = zip(*points, strict=True)
    top = max(every_y) or 1.0
    lowest = max(min(every_y), pictures.FLOOR * top) if log else 0.0
    lowest, top = panel.get("ylim", (lowest, top))
    scale = math.log10 if log else float
    low, high, left, right = scale(lowest), scale(top), min(every_x), max(every_x)

    def place(x: float, y: float) -> tuple[float, float]:
        share = (scale(max(y, lowest)) - low) / ((high - low) or 1)
        across = (x - left) / ((right - left) or 1)
        return LEFT + across * (WIDTH - LEFT - 8), TOP + (1 - share) * (HEIGHT - BOTTOM - TOP)

    parts = []
    for tick in ticks(lowest, top, log):
        _, y = place(left, tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - 8}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    for x, anchor in ((left, "start"), (right, "end")):
        across, _ = place(x, top)
        parts.append(f'<text x="{across:.0f}" y="{HEIGHT - 5}" text-anchor="{anchor}">{x:g}</text>')
    for label, x in panel.get("marks", {}).items():
        across, _ = place(x, top)
        parts.append(f'<path stroke-dasharray="3" d="M{across:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{across:.1f}" y="{TOP - 6}">{escape(label)}</text>')
    keys = []
    for i, (label, line) in enumerate(lines.items()):
        drawn = " ".join("{:.1f},{:.1f}".format(*place(*p)) for p in zip(*line, strict=True))
        parts.append(f'<polyline style="stroke:var(--c{i % 4})" points="{drawn}"/>')
        keys.append(f'<span><i style="background:var(--c{i % 4})"></i>{escape(label)}</span>')
    title = escape(f"{panel['ylabel']}, by {panel['xlabel']}")
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
    below = f'<div class="keys">{"".join(keys)}</div>' if len(keys) > 1 else ""
    return f"<div><p>{title}</p>{svg}{''.join(parts)}</svg>{below}</div>"


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Some round numbers from `low` to `high`."""
    if log:
        decades = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
        return [10.0**power for power in decades] or [low, high]
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= 5)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]
