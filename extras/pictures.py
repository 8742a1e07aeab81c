"""Pictures: sheets of images by Pillow, charts by matplotlib, which only they need.

python -m extras.pictures runs/synthetic            draws RUN/curves.png from RUN/log.jsonl
"""

import argparse
import importlib.util
import json
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import runtime
from runtime import UserError

RIGHT, WRONG, PLAIN = (0, 150, 60), (210, 30, 30), (90, 90, 90)  # frames
HEIGHT, GAP, FRAME = 72, 8, 4  # pixels: of an image, between cells, of a frame


# --- sheets


class Cell(NamedTuple):
    """One sample in a sheet: its images (uint8 (3, H, W) by modality), lines of text above them, and the frame's colour."""

    images: dict[str, Tensor]
    lines: tuple[str, ...]
    colour: tuple[int, int, int] = PLAIN


def sheet(rows: list[list[Cell]], modalities: tuple[str, ...], path: str | Path) -> None:
    """Draw rows of cells, a cell's modalities below one another; one that it lacks stays grey."""
    shapes = [image.shape for row in rows for cell in row for image in cell.images.values()]
    width = max(round(HEIGHT * W / H) for _, H, W in shapes)
    font = ImageFont.load_default(12)
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lines = [line for row in rows for cell in row for line in cell.lines]
    cell_width = max([width + 2 * FRAME, *(round(probe.textlength(line, font)) for line in lines)]) + GAP
    text = 15 * max(len(cell.lines) for row in rows for cell in row)
    row_height = text + len(modalities) * HEIGHT + 2 * FRAME + 2 * GAP
    left = max(round(probe.textlength(modality, font)) for modality in modalities) + 2 * GAP
    size = left + max(map(len, rows)) * cell_width, len(rows) * row_height + GAP
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for r, row in enumerate(rows):
        top = GAP + r * row_height
        for m, modality in enumerate(modalities):
            draw.text((GAP, top + text + FRAME + m * HEIGHT + HEIGHT // 2 - 8), modality, "black", font)
        for c, cell in enumerate(row):
            x = left + c * cell_width
            for i, line in enumerate(cell.lines):
                draw.text((x, top + 15 * i), line, "black", font)
            box = (x, top + text, x + width + 2 * FRAME - 1, top + text + len(modalities) * HEIGHT + 2 * FRAME - 1)
            draw.rectangle(box, (215, 215, 215), cell.colour, FRAME)
            for m, modality in enumerate(modalities):
                if modality in cell.images:
                    image = Image.fromarray(cell.images[modality].permute(1, 2, 0).numpy())
                    fitted = image.resize((round(HEIGHT * image.width / image.height), HEIGHT), Image.Resampling.LANCZOS)
                    picture.paste(fitted, (x + FRAME + (width - fitted.width) // 2, top + text + FRAME + m * HEIGHT))
    _save(picture, path)


Chosen = list[tuple[int, str]]  # queries, each with the reason why it is drawn
Similarities = Callable[[int, int], Tensor]  # of the queries from start to end - 1 to the gallery, (end - start, G)


def ranked_list(query, gallery, similarities: Similarities, ap: Tensor, chosen: Chosen, path: str | Path, top=10) -> None:
    """Queries (data.Split) with the `top` gallery samples nearest to them; of the query's own identity framed in green, else
    red. Samples of its identity and camera (or scene) are left out, as in the metric."""
    rows = []
    for i, reason in chosen:
        order, similarity = _order(query, gallery, similarities, i)
        answers = [_answer(query, gallery, i, j, similarity[j]) for j in order[:top].tolist()]
        rows.append([_query(query, i, f"{reason}, AP {100 * ap[i]:.0f}%"), *answers])
    sheet(rows, query.modalities, path)


def failures(query, gallery, similarities: Similarities, ap: Tensor, chosen: Chosen, path: str | Path, top=6) -> None:
    """Queries with the wrong samples nearest to them, and the right one that comes first with its rank."""
    rows = []
    for i, reason in chosen:
        order, similarity = _order(query, gallery, similarities, i)
        right = gallery.pids[order] == query.pids[i]
        cells = [_answer(query, gallery, i, j, similarity[j]) for j in order[~right][:top].tolist()]
        first = int(right.nonzero()[0])
        cells.append(_answer(query, gallery, i, int(order[first]), similarity[order[first]], f"rank {first + 1}: "))
        rows.append([_query(query, i, f"{reason}, AP {100 * ap[i]:.0f}%"), *cells])
    sheet(rows, query.modalities, path)


def _order(query, gallery, similarities: Similarities, i: int) -> tuple[Tensor, Tensor]:
    """The gallery as ranked for query i, best first, and all similarities to it."""
    similarity = similarities(i, i + 1)[0]
    order = similarity.argsort(descending=True)
    return order[(gallery.pids[order] != query.pids[i]) | (gallery.keys[order] != query.keys[i])], similarity


def _name(sample) -> str:
    return sample.name.rpartition("/")[2]  # says identity and camera, or scene, as the data set writes them


def _query(query, i: int, line: str) -> Cell:
    sample = query.samples[i]
    return Cell(query[i][0], (_name(sample), line))


def _answer(query, gallery, i: int, j: int, similarity: float, prefix: str = "") -> Cell:
    sample = gallery.samples[j]
    right = sample.pid == query.samples[i].pid
    lines = (prefix + _name(sample), f"distance {1 - similarity:.2f}")
    return Cell(gallery[j][0], lines, RIGHT if right else WRONG)


def attention(split, look: Callable[[dict], dict], chosen: Chosen, path: str | Path) -> None:
    """Samples of a split, each beside a map of where the fusion token looks in each modality's encoder, which `look` says of
    its images: weights (rows, columns) by modality."""
    rows = []
    for i, _ in chosen:
        images, _, _ = split[i]
        maps = look(images)
        heated = {modality: heat(image, maps[modality]) for modality, image in images.items()}
        shares = ", ".join(f"{modality} {100 * weights.sum():.0f}%" for modality, weights in maps.items())
        rows.append([Cell(images, (split.samples[i].name, "")), Cell(heated, ("on patches:", shares))])
    half = (len(rows) + 1) // 2  # two samples a row
    sheet([a + b for a, b in zip_longest(rows[:half], rows[half:], fillvalue=[])], split.modalities, path)


def heat(image: Tensor, weights: Tensor) -> Tensor:
    """An image (3, H, W), uint8, in grey, under a map of weights (rows, columns): black over red and yellow to white."""
    grey = image.float().mean(0)
    large = F.interpolate(weights[None, None].float(), image.shape[-2:], mode="bicubic")[0, 0].clamp(min=0)
    strength = large / large.max().clamp(min=1e-12)
    colours = torch.stack([(3 * strength - shift).clamp(0, 1) for shift in (0, 1, 2)])
    return (0.45 * grey + 0.55 * 255 * colours).to(torch.uint8)


def _save(picture: Image.Image, path: str | Path) -> None:
    try:
        picture.save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written ({error}); expected a file name as picture.png") from None


# --- charts


def need_matplotlib() -> None:
    """Raises UserError where matplotlib is absent: before work whose result is to be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("charts need matplotlib, which is not installed: pip install matplotlib")


def chart(panels: list[dict], path: str | Path) -> None:
    """Panels side by side: `lines` {label: (x, y)}, and what else Axes.set takes (xlabel, ylabel, title, ...)."""
    need_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, (x, y) in panel.pop("lines").items():
            axes.plot(x, y, marker="o" if len(x) < 30 else None, markersize=4, label=label)
        axes.set(**panel)
        axes.xaxis.get_major_locator().set_params(integer="millions" not in panel["xlabel"])
        axes.grid(alpha=0.3)
        axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written ({error}); expected a file name as chart.png") from None


def size_chart(series: dict[str, list[dict]], path: str | Path) -> None:
    """mAP over non-zero parameters, as Fig. 1: a line for each label's rows of prune.py."""
    lines = {
        label: ([row["params"] / 1e6 for row in rows], [100 * row["mAP"] for row in rows]) for label, rows in series.items()
    }
    chart([{"lines": lines, "xlabel": "non-zero parameters (millions)", "ylabel": "mAP (%)"}], path)


def cmc_chart(cmc: Tensor, path: str | Path) -> None:
    """The cumulative match characteristic, from rank 1 on."""
    x, y = np.arange(1, len(cmc) + 1), 100 * cmc.numpy()
    chart([{"lines": {"CMC": (x, y)}, "xlabel": "rank", "ylabel": "queries with a match so far (%)"}], path)


def curves(folder: Path) -> Path:
    """Losses and learning rate, epoch by epoch, and the validation's mAP where there is one: FOLDER/curves.png."""
    log = folder / "log.jsonl"
    if not log.is_file():
        raise UserError(f"{log}: no such file; expected the folder of a run of train.py")
    try:
        epochs = [record for record in map(json.loads, log.read_text().splitlines()) if record["event"] == "epoch"]
        x = range(1, len(epochs) + 1)
        lines = {name: (x, [record[name] for record in epochs]) for name in ("loss", "triplet", "cross_entropy", "center")}
        rate = {"learning rate": (x, [record["lr"] for record in epochs])}
        scores = {"mAP": (x, [100 * record["validation"]["mAP"] for record in epochs if "validation" in record])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{log}: not a log of train.py ({error!r})") from None
    if not epochs:
        raise UserError(f"{log}: holds no epoch yet")
    stages = [record["stage"] for record in epochs]
    first = f"epoch ({stages.count(1)} of stage 1, {stages.count(2)} of stage 2)"
    panels = [{"lines": lines, "xlabel": first, "ylabel": "mean loss", "yscale": "symlog"}]
    panels += [{"lines": rate, "xlabel": first, "ylabel": "last of the epoch"}]
    panels += [{"lines": scores, "xlabel": first, "ylabel": "validation mAP (%)"}] if scores["mAP"][1] else []
    chart(panels, folder / "curves.png")
    return folder / "curves.png"


@runtime.program
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run of train.py, e.g. runs/synthetic")
    parser.add_argument("--seed", type=int, default=0, help="unused: nothing is drawn by chance")
    print(curves(parser.parse_args().run))


if __name__ == "__main__":
    main()
