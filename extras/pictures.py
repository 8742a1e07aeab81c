"""Pictures: sheets of images by Pillow, charts by matplotlib, which only they need.

python -m extras.pictures runs/synthetic            draws RUN/curves.png from RUN/log.jsonl
python -m extras.pictures runs/synthetic --html     all on one page, RUN/report.html

evaluate.py draws ranked lists, failures, attention maps and the CMC curve by `draw`.
"""

import argparse
import importlib.util
import json
from itertools import zip_longest
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
from runtime import UserError

RIGHT, WRONG, PLAIN = (0, 150, 60), (210, 30, 30), (90, 90, 90)  # frames
OWN_TOKENS = ("graft", "multistream")  # fusions: the embedding is the mean of the modalities'
HEIGHT, GAP, FRAME, LINE = 72, 8, 4, 15  # pixels: of an image, between cells, a frame, a text line


# --- what evaluate.py asks for


def draw(args: argparse.Namespace, embedder: evaluate.Embedder, ranking: evaluate.Ranking) -> None:
    """The pictures that the options of evaluate.py name."""
    ap, query = ranking.metrics.ap, ranking.query
    chosen = choose(args.queries, query, ap, args.seed)
    if args.ranked_list:
        ranked_list(ranking, chosen, args.ranked_list)
    if args.failures:
        failures(ranking, worst(ap), args.failures)
    if args.cmc:
        cmc_chart(ranking.metrics.cmc, args.cmc)
    if args.attention:
        attention(embedder, query, [i for i, _ in chosen], args.attention)
        print_reliance(embedder, query)
    if args.map:
        from extras import tsne

        tsne.draw(embedder, ranking.gallery, args.map, args.seed)


def worst(ap: Tensor, count: int = 6) -> list[tuple[int, str]]:
    return [(i, "worst") for i in ap.argsort().tolist() if not ap[i].isnan()][:count]


def choose(words: list[str], query: data.Split, ap: Tensor, seed: int) -> list[tuple[int, str]]:
    """Queries to draw, each with the reason: two random, best or worst ones, or one by name."""
    by_ap = [i for i in ap.argsort().tolist() if not ap[i].isnan()]
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(query), generator=generator).tolist()
    lists = {"random": shuffled[:2], "best": by_ap[::-1][:2], "worst": by_ap[:2]}
    names = {sample.name: i for i, sample in enumerate(query.samples)}
    chosen = []
    for word in words:
        if word in lists:
            chosen += [(i, word) for i in lists[word]]
        elif word in names:
            chosen.append((names[word], "named"))
        else:
            example = next(iter(names))
            raise UserError(
                f"--queries {word}: no query has this name; expected random, best, worst or e.g."
                f" {example}"
            )
    return chosen


def print_reliance(embedder: evaluate.Embedder, query: data.Split) -> None:
    """By how much embeddings turn without a modality, for the darker and the brighter half."""
    turned = reliance(embedder, query)  # (N, M)
    first = [next(iter(query[i][0].values())) for i in range(len(query))]
    light = torch.stack([image.float().mean() for image in first])
    darker = light <= light.median()
    for name, half in (("darker", darker), ("brighter", ~darker)):
        means = zip(query.modalities, turned[half].mean(0).tolist(), strict=True)
        shares = "  ".join(f"{modality} {mean:.3f}" for modality, mean in means)
        print(
            f"{name} half of the queries: without it, an embedding turns by (1 - cosine)  {shares}"
        )


def reliance(embedder: evaluate.Embedder, split: data.Split) -> Tensor:
    """1 - cosine of each sample's embedding with and without a modality: (N, M), 0 if absent."""

    def turned(images: dict[str, Tensor]) -> Tensor:
        whole = embedder.features(images)
        columns = []
        for modality in split.modalities:
            rest = {name: image for name, image in images.items() if name != modality}
            without = embedder.features(rest) if rest else whole
            columns.append(1 - (whole * without).sum(1))
        return torch.stack(columns, 1)

    return embedder.for_each(split, turned, len(split.modalities))


def own_tokens(embedder: evaluate.Embedder, split: data.Split) -> tuple[Tensor, Tensor]:
    """Each modality's own tested tokens, (N, M, D), and which a sample has, (N, M).

    Of a fusion whose embedding is their mean: see OWN_TOKENS.
    """
    names, kind = split.modalities, embedder.model.config.test_token

    def own(images: dict[str, Tensor]) -> Tensor:
        encoded = zip(images, embedder.model.encode(images), strict=True)
        tokens = {name: getattr(embeddings, kind) for name, embeddings in encoded}
        absent = torch.zeros_like(next(iter(tokens.values())))
        return torch.cat([tokens.get(name, absent) for name in names], 1)

    rows = embedder.for_each(split, own, len(names) * embedder.model.width)
    present = torch.tensor([[name in sample.images for name in names] for sample in split.samples])
    return rows.unflatten(1, (len(names), -1)), present


@torch.no_grad()
def mean_features(embedder: evaluate.Embedder, own: Tensor, present: Tensor) -> Tensor:
    """Embeddings (N, D) of those tokens (N, M, D) that are `present` (N, M), as Embedder's."""
    tokens = (own * present[..., None]).sum(1) / present.sum(1, keepdim=True)
    if embedder.model.config.bnneck_features:
        tokens = embedder.model.bottleneck(tokens.to(embedder.device)).cpu()
    return F.normalize(tokens)


# --- sheets


class Cell(NamedTuple):
    """One sample in a sheet: images (uint8 (3, H, W)), lines of text above them, frame's colour."""

    images: dict[str, Tensor]
    lines: tuple[str, ...]
    colour: tuple[int, int, int] = PLAIN


def sheet(rows: list[list[Cell]], modalities: tuple[str, ...], path: str | Path) -> None:
    """Draw rows of cells, a cell's modalities below one another; one that it lacks stays grey."""
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
    size = left + max(map(len, rows)) * cell_width, len(rows) * row_height + GAP
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    for r, row in enumerate(rows):
        top = GAP + r * row_height + text_height
        for m, modality in enumerate(modalities):
            y = top + FRAME + m * HEIGHT + HEIGHT // 2 - 8
            pen.text((GAP, y), modality, "black", font)
        for c, cell in enumerate(row):
            x = left + c * cell_width
            for i, line in enumerate(cell.lines):
                pen.text((x, top - text_height + LINE * i), line, "black", font)
            box = (x, top, x + width + 2 * FRAME - 1, top + frame_height - 1)
            pen.rectangle(box, (215, 215, 215), cell.colour, FRAME)
            for m, modality in enumerate(modalities):
                if modality in cell.images:
                    image = fit(cell.images[modality])
                    offset = (width - image.width) // 2
                    picture.paste(image, (x + FRAME + offset, top + FRAME + m * HEIGHT))
    save(picture.save, path)


def fit(image: Tensor) -> Image.Image:
    """An image (3, H, W), uint8, at a sheet's height."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    width = round(HEIGHT * picture.width / picture.height)
    return picture.resize((width, HEIGHT), Image.Resampling.LANCZOS)


def save(write, path: str | Path) -> None:
    """Call write(path). Raises UserError where that fails."""
    try:
        write(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be written ({error}); expected a file name as picture.png"
        ) from None


Chosen = list[tuple[int, str]]  # queries, each with the reason why it is drawn


def both_sides(ranking: evaluate.Ranking) -> tuple[str, ...]:
    """The modalities that query or gallery have."""
    return tuple(dict.fromkeys((*ranking.query.modalities, *ranking.gallery.modalities)))


def ranked_list(ranking: evaluate.Ranking, chosen: Chosen, path: str | Path, top=10) -> None:
    sheet(ranked_rows(ranking, chosen, top), both_sides(ranking), path)


def ranked_rows(ranking: evaluate.Ranking, chosen: Chosen, top: int = 10) -> list[list[Cell]]:
    """Queries with the `top` gallery samples nearest to them: right ones framed green, wrong red.

    Samples of the query's identity and camera (or scene) are left out, as in the metric.
    """
    rows = []
    for i, reason in chosen:
        order, similarity = order_of(ranking, i)
        answers = [answer(ranking, i, j, similarity[j]) for j in order[:top].tolist()]
        rows.append([asked(ranking, i, reason), *answers])
    return rows


def failures(ranking: evaluate.Ranking, chosen: Chosen, path: str | Path, top=6) -> None:
    sheet(failure_rows(ranking, chosen, top), both_sides(ranking), path)


def failure_rows(ranking: evaluate.Ranking, chosen: Chosen, top: int = 6) -> list[list[Cell]]:
    """Queries with the wrong samples nearest to them, and the first right one with its rank."""
    rows = []
    for i, reason in chosen:
        order, similarity = order_of(ranking, i)
        right = ranking.gallery.pids[order] == ranking.query.pids[i]
        wrong = order[~right][:top].tolist()
        cells = [answer(ranking, i, j, similarity[j]) for j in wrong]
        first = int(right.nonzero()[0])
        j = int(order[first])
        cells.append(answer(ranking, i, j, similarity[j], f"rank {first + 1}: "))
        rows.append([asked(ranking, i, reason), *cells])
    return rows


def order_of(ranking: evaluate.Ranking, i: int) -> tuple[Tensor, Tensor]:
    """The gallery as ranked for query i, best first, and all similarities to it."""
    query, gallery = ranking.query, ranking.gallery
    similarity = ranking.similarities(i, i + 1)[0]
    order = similarity.argsort(descending=True)
    other_pid = gallery.pids[order] != query.pids[i]
    other_key = gallery.keys[order] != query.keys[i]
    return order[other_pid | other_key], similarity


def short_name(sample: data.Sample) -> str:
    return sample.name.rpartition("/")[2]  # holds identity and camera, as the data set writes them


def asked(ranking: evaluate.Ranking, i: int, reason: str) -> Cell:
    line = f"{reason}, AP {100 * ranking.metrics.ap[i]:.0f}%"
    return Cell(ranking.query[i][0], (short_name(ranking.query.samples[i]), line))


def answer(ranking: evaluate.Ranking, i: int, j: int, similarity: float, prefix="") -> Cell:
    sample = ranking.gallery.samples[j]
    colour = RIGHT if sample.pid == ranking.query.samples[i].pid else WRONG
    lines = (prefix + short_name(sample), f"distance {1 - similarity:.2f}")
    return Cell(ranking.gallery[j][0], lines, colour)


def attention(
    embedder: evaluate.Embedder, split: data.Split, chosen: list[int], path: str | Path
) -> None:
    rows = attention_rows(embedder, split, chosen)
    half = (len(rows) + 1) // 2  # two samples a row
    pairs = zip_longest(rows[:half], rows[half:], fillvalue=[])
    sheet([a + b for a, b in pairs], split.modalities, path)


def attention_rows(
    embedder: evaluate.Embedder, split: data.Split, chosen: list[int]
) -> list[list[Cell]]:
    """Samples of a split, each beside a map of the fusion token's attention in every encoder."""
    rows = []
    for i in chosen:
        images, _, _ = split[i]
        batch = runtime.to_device(
            {name: image[None] for name, image in images.items()}, embedder.device
        )
        maps = embedder.model.attention(embedder.normalise(batch))
        maps = {modality: weights[0].cpu() for modality, weights in maps.items()}
        heated = {modality: heat(image, maps[modality]) for modality, image in images.items()}
        sums = ", ".join(f"{name} {100 * weights.sum():.0f}%" for name, weights in maps.items())
        cells = [Cell(images, (split.samples[i].name, "")), Cell(heated, ("on patches:", sums))]
        rows.append(cells)
    return rows


def heat(image: Tensor, weights: Tensor) -> Tensor:
    """An image (3, H, W), uint8, in grey under weights (rows, columns), from black to white."""
    grey = image.float().mean(0)
    size = image.shape[-2:]
    large = F.interpolate(weights[None, None].float(), size, mode="bicubic")[0, 0].clamp(min=0)
    strength = large / large.max().clamp(min=1e-12)
    colours = torch.stack([(3 * strength - shift).clamp(0, 1) for shift in (0, 1, 2)])
    return (0.45 * grey + 0.55 * 255 * colours).to(torch.uint8)


# --- charts


def need_matplotlib() -> None:
    """Raises UserError where matplotlib is absent: before work whose result is to be drawn."""
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
        lines = panel.pop("lines")
        marks, bands = panel.pop("marks", {}), panel.pop("bands", {})
        for label, (x, y) in lines.items():
            colour = colours.setdefault(label, f"C{len(colours)}")
            marker = "o" if len(x) < 30 else None
            axes.plot(x, y, color=colour, marker=marker, markersize=4, label=label)
        for label, (x, low, high) in bands.items():
            colour = colours.get(label.removeprefix("_"), "C0")
            axes.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0, label=label)
        for label, x in marks.items():
            axes.axvline(x, color="grey", linestyle=":", linewidth=1)
            axes.annotate(
                label, (x, 1), xycoords=("data", "axes fraction"), va="bottom", fontsize=8
            )
        axes.set(**panel)
        axes.grid(alpha=0.3)
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, fontsize=8, frameon=False
        )
    save(lambda path: figure.savefig(path, dpi=120), path)


def size_chart(series: dict[str, list[dict]], path: str | Path) -> None:
    """mAP over non-zero parameters, as Fig. 1: a line for each label's rows of prune.py."""
    lines = {}
    for label, rows in series.items():
        x, y = [row["params"] / 1e6 for row in rows], [100 * row["mAP"] for row in rows]
        lines[label] = (x, y)
    axes = {"xlabel": "non-zero parameters (millions)", "ylabel": "mAP (%)"}
    chart([{"lines": lines, **axes}], path)


def cmc_chart(cmc: Tensor, path: str | Path) -> None:
    """The cumulative match characteristic, from rank 1 on."""
    x, y = np.arange(1, len(cmc) + 1), 100 * cmc.numpy()
    axes = {"xlabel": "rank", "ylabel": "queries with a match so far (%)"}
    chart([{"lines": {"CMC": (x, y)}, **axes}], path)


LOSSES = ("loss", "triplet", "cross_entropy", "center")


def curves(folder: Path) -> Path:
    """FOLDER/curves.png: losses, learning rate, gradient norm, and the validation's mAP if any."""
    steps, epochs = read_log(folder / "log.jsonl")
    ends = [max(step["step"] for step in steps if step["stage"] == 1)] if _both(steps) else []
    first = ends[0] if ends else 0
    x = [step["step"] + (first if step["stage"] == 2 else 0) for step in steps]
    axes = {"xlabel": "step", "marks": dict.fromkeys(["stage 2"], first) if first else {}}

    def panel(names: tuple[str, ...], ylabel: str, yscale: str = "linear") -> dict:
        lines = {name: (x, [step[name] for step in steps]) for name in names}
        return {"lines": lines, "ylabel": ylabel, "yscale": yscale, **axes}

    panels = [
        panel(LOSSES, "mean loss", "symlog"),
        panel(("lr",), "learning rate", "log"),
        panel(("gradient_norm",), "gradient norm", "log"),
    ]
    scores = [100 * epoch["validation"]["mAP"] for epoch in epochs if "validation" in epoch]
    if scores:
        lines = {"mAP": (list(range(1, len(scores) + 1)), scores)}
        panels.append({"lines": lines, "xlabel": "epoch", "ylabel": "validation mAP (%)"})
    chart(panels, folder / "curves.png")
    return folder / "curves.png"


def _both(steps: list[dict]) -> bool:
    return {step["stage"] for step in steps} >= {1, 2}


def read_log(path: Path) -> tuple[list[dict], list[dict]]:
    """The step and the epoch lines of a run's log. Raises UserError where it is none."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the folder of a run of train.py")
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        steps = [record for record in records if record["event"] == "step"]
        epochs = [record for record in records if record["event"] == "epoch"]
        lacking = {"stage", "step", "lr", "gradient_norm", *LOSSES}
        if any(lacking - step.keys() for step in steps):
            raise ValueError("a step without its losses")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a log of train.py ({error!r})") from None
    if not steps:
        raise UserError(f"{path}: holds no step yet")
    return steps, epochs


@runtime.program
def main() -> None:
    parser = runtime.Parser(__doc__, prog="python -m extras.pictures")
    text = "folder of a run of train.py, e.g. runs/synthetic"
    parser.add_argument("run", metavar="RUN", type=Path, help=text)
    text = "write RUN/report.html instead: figures, charts, ranked lists, attention, settings"
    parser.add_argument("--html", action="store_true", help=text)
    group = parser.add_argument_group("for --html")
    data.add_options(group, trained=True)
    runtime.add_device_options(group, precision=None)
    text = "reading processes (default: as in training)"
    group.add_argument("--workers", type=runtime.whole(0), help=text)
    data.add_store_option(group)
    text = "of the random queries that are shown"
    group.add_argument("--seed", type=runtime.whole(0), default=0, help=text)
    args = parser.parse_args()
    if not args.html:
        print(curves(args.run))
        return
    from extras import page

    print(page.write(args))


if __name__ == "__main__":
    main()
