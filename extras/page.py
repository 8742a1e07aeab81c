"""A run on one HTML page: metrics, curves, CMC, ranked lists, failures, attention, settings.

`python -m extras.pictures RUN --html` writes it. The page holds its pictures and charts itself and
needs no network.
"""

import argparse
import base64
import io
from html import escape
from pathlib import Path

import evaluate
import runtime
from extras import pictures
from extras.pictures import Cell
from model import GraFT

STYLE = """
body { color: #1c1c1c; font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 0 auto;
  padding: 1rem; }
h1 { font-size: clamp(1.3rem, 5vw, 2rem); line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 .4rem; font-size: 1.2rem; }
p, figcaption { color: #666; }
.cards { display: flex; flex-wrap: wrap; gap: .5rem 2rem; }
.cards b { display: block; font-size: 1.9rem; line-height: 1.2; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; }
.row { display: flex; gap: .5rem; overflow-x: auto; padding: .3rem 0 .6rem; }
.long { padding-right: 3rem; mask-image: linear-gradient(to left, #0000, #000 3rem); }
figure { margin: 0; flex: none; font-size: .75rem; }
figure div { border: 4px solid #666; width: fit-content; }
figure.right div { border-color: #00963c; }
figure.wrong div { border-color: #d21e1e; }
figure img { display: block; }
.absent { display: grid; place-items: center; box-sizing: border-box; border: 1px dashed #666; }
figcaption { max-width: 11rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
td { padding: .15rem 1rem .15rem 0; border-bottom: 1px solid #ddd; }
details td { overflow-wrap: anywhere; }
"""


def write(args: argparse.Namespace, folder: Path) -> Path:
    """FOLDER/report.html, from the checkpoint and the log in it, and the data set."""
    pictures.need("matplotlib")
    panels = pictures.training_panels(folder)  # first: a mistake is found before the work
    embedder, dataset = evaluate.open_checkpoint(args)
    ranking = evaluate.rank_splits(embedder, dataset.query, dataset.gallery)
    metrics = evaluate.metrics_dict(embedder.model, ranking)
    title = (
        f"{folder.resolve().name}: {embedder.settings.get('fusion', 'graft')} on {args.dataset},"
        f" {' + '.join(dataset.modalities)}, {100 * metrics['mAP']:.1f}% mAP"
    )
    sections = [
        head(title, metrics),
        sensors(embedder, dataset, metrics),
        charts([pictures.cmc_panel(ranking.metrics.cmc), *panels]),
        *queries(embedder, ranking, args.seed),
        settings_table(embedder.settings),
    ]
    lines = [
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        *sections,
        "</html>\n",
    ]
    page = "\n".join(lines)
    path = folder / "report.html"
    runtime.write_atomically(path, lambda temporary: temporary.write_text(page, "utf-8"))
    return path


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


def sensors(embedder: evaluate.Embedder, dataset, metrics: dict) -> str:
    """A table of all subsets of the sensors, the largest first."""
    *others, every = evaluate.subsets(dataset.modalities)
    if not others:
        return ""
    results = {every: metrics}
    for subset in reversed(others):
        parts = [split.restricted(subset) for split in (dataset.query, dataset.gallery)]
        if all(map(len, parts)):
            sides = ((part, embedder.embed(part)) for part in parts)
            ranking = evaluate.rank_features(embedder.model.similarity, *sides)
            results[subset] = evaluate.metrics_dict(embedder.model, ranking)
    columns = ("mAP", "R1", "R5", "R10")
    rows = [["sensors in testing", *columns]]
    for subset, values in results.items():
        rows.append([" + ".join(subset), *(f"{100 * values[name]:.1f}" for name in columns)])
    return "<h2>With some of the sensors</h2>" + table(rows)


def charts(panels: list[dict]) -> str:
    """Each panel as a picture of its own, narrow enough for a phone to show unscaled."""
    drawn = []
    for panel in panels:
        file = io.BytesIO()
        pictures.figure([panel], width=3.4).savefig(file, format="svg")
        title = f"{panel['ylabel']}, by {panel['xlabel']}"
        drawn.append(inlined(file, "svg+xml", title))
    return f'<h2>Ranking and training</h2><div class="charts">{"".join(drawn)}</div>'


def queries(embedder: evaluate.Embedder, ranking: evaluate.Ranking, seed: int) -> list[str]:
    """Ranked lists, failures, attention."""
    query, ap, names = ranking.query, ranking.metrics.ap, ranking.query.modalities
    chosen = pictures.choose(["random", "best", "worst"], query, ap, seed)
    worst = pictures.choose(["worst"], query, ap, seed, 6)
    failures = pictures.ranked_list(ranking, worst, 6, failures=True)
    sections = [
        f"<h2>Queries and their ten best</h2><p>From top to bottom: {escape(', '.join(names))}."
        " ✓ the same identity, ✗ another. Scroll a row sideways for the rest →</p>"
        + rows_of_cells(pictures.ranked_list(ranking, chosen), names, "row long"),
        "<h2>Worst queries</h2><p>Their most similar wrong samples, and at the end the first"
        " correct match. Scroll sideways →</p>" + rows_of_cells(failures, names, "row long"),
    ]
    if isinstance(embedder.model, GraFT):
        rows = pictures.attention(embedder, query, [i for i, _ in chosen])
        sections.append(
            "<h2>Attention</h2><p>Where the fusion token attends in each sensor's encoder."
            f" {' '.join(pictures.ATTENTION)}</p>"
            f'<div class="charts">{rows_of_cells(rows, names, "row")}</div>'
        )
    return sections


def settings_table(settings: dict) -> str:
    rows = [[name, str(value)] for name, value in sorted(settings.items())]
    return f"<h2>Settings</h2><details><summary>all {len(rows)}</summary>{table(rows)}</details>"


# --- parts


def table(rows: list[list[str]]) -> str:
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def rows_of_cells(rows: list[list[Cell]], names: tuple[str, ...], kind: str) -> str:
    figures = ["".join(figure(cell, names) for cell in row) for row in rows]
    return "".join(f'<div class="{kind}">{text}</div>' for text in figures)


MARKS = {pictures.RIGHT: ("right", "✓ "), pictures.WRONG: ("wrong", "✗ ")}


def figure(cell: Cell, names: tuple[str, ...]) -> str:
    """A sample: its sensors' images below one another, empty where it lacks one, and its text."""
    kind, mark = MARKS.get(cell.colour, ("plain", ""))
    images = {name: pictures.fit(image) for name, image in cell.images.items()}
    width = max(image.width for image in images.values())
    size = f"width:{width}px;height:{pictures.HEIGHT}px"
    parts = []
    for name in names:
        if name in images:
            file = io.BytesIO()
            images[name].save(file, "JPEG", quality=88)
            parts.append(inlined(file, "jpeg", name))
        else:
            parts.append(f'<span class="absent" style="{size}">no {escape(name)}</span>')
    text = "<br>".join(map(escape, cell.lines))
    return (
        f'<figure class="{kind}"><div>{"".join(parts)}</div>'
        f"<figcaption>{mark}{text}</figcaption></figure>"
    )


def inlined(file: io.BytesIO, kind: str, name: str) -> str:
    content = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(name)}" src="data:image/{kind};base64,{content}">'
