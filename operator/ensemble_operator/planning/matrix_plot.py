"""The allocation matrix as a heat map. The only file that imports matplotlib, and only when a plot is asked for."""

from __future__ import annotations

import importlib.util
import textwrap
from pathlib import Path

import numpy as np

from ensemble_operator.allocation.planner import Plan
from ensemble_operator.allocation.problem import Problem
from ensemble_operator.errors import EnsembleError
from ensemble_operator.planning.matrix_table import lines_of

MAX_SINGLE_DEVICES = 64
MAX_LABELLED_CELLS = 1500
CHARACTERS_AN_INCH = 11


class PlotUnavailable(EnsembleError):
    """No plot can be drawn here, or not to that file."""


def check_plot(path: Path) -> None:
    """Whether a plot can be drawn, before minutes of measuring.

    Raises PlotUnavailable.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotUnavailable("--plot needs matplotlib: pip install 'ensemble-operator[plot]'")
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise PlotUnavailable(f"--plot {path}: must end in .png, .svg or .pdf")
    if not path.absolute().parent.is_dir():
        raise PlotUnavailable(f"--plot {path}: there is no folder {path.absolute().parent}")


def plot_matrix(title: str, problem: Problem, plan: Plan, path: Path) -> None:
    """Draw devices down, members across, darker for larger batches; many interchangeable devices are one line.

    Raises PlotUnavailable if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = lines_of(problem, plan, collapse=len(problem.devices) > MAX_SINGLE_DEVICES)
    members = plan.matrix.members
    sizes = np.array([[line.row.get(member, 0) for member in members] for line in lines], dtype=np.float64)
    shape = min(30.0, 3 + 0.45 * len(members)), min(40.0, 2 + 0.3 * len(lines))
    figure = Figure(figsize=shape, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(np.log2(1 + sizes), cmap="Blues", aspect="auto", vmin=0)
    labels = [f"{line.label} ({line.utilisation:.0%})" for line in lines]
    axes.set_xticks(range(len(members)), members, rotation=60, ha="right")
    axes.set_yticks(range(len(lines)), labels)
    for tick, line in zip(axes.get_yticklabels(), lines, strict=True):
        tick.set_fontweight("bold" if line.is_bottleneck else "normal")
    if sizes.size <= MAX_LABELLED_CELLS:
        middle = np.log2(1 + sizes.max()) / 2
        for at_line, at_member in np.argwhere(sizes):
            size = sizes[at_line, at_member]
            color = "white" if np.log2(1 + size) > middle else "black"
            axes.text(at_member, at_line, f"{size:.0f}", ha="center", va="center", fontsize=8, color=color)
    figures = f"{plan.predicted_rows_per_s:.6g} rows/s, {plan.gap:.1%} below the bound"
    axes.set_title("\n".join([*textwrap.wrap(title, int(CHARACTERS_AN_INCH * shape[0])), figures]), fontsize=10)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise PlotUnavailable(f"--plot {path}: cannot be written: {error.strerror}") from error
