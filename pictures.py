"""Pictures: charts by matplotlib, which only they need."""

import importlib.util
from pathlib import Path

from runtime import UserError


def need_matplotlib() -> None:
    """Raises UserError where matplotlib is absent: before work whose result is to be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("charts need matplotlib, which is not installed: pip install matplotlib")


def size_chart(series: dict[str, list[dict]], path: str | Path) -> None:
    """mAP in percent over non-zero parameters in millions, as Fig. 1: a line for each label's rows of prune.py."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, rows in series.items():
        axes.plot([row["params"] / 1e6 for row in rows], [100 * row["mAP"] for row in rows], marker="o", label=label)
    axes.set(xlabel="non-zero parameters (millions)", ylabel="mAP (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
