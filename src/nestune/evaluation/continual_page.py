"""A sequence of tasks for people: the heatmap of its scores, and one page about them."""

import base64
from collections.abc import Mapping
from typing import Any

from nestune.evaluation.plots import INK, picture
from nestune.evaluation.report import DECIMALS, page_templates
from nestune.evaluation.uncertainty import Interval

BEFORE = "before"
MEANINGS = {
    "average_accuracy": ("average", "mean score over all tasks after the last one"),
    "backward_transfer": (
        "backward transfer",
        "score of a task at the end, less that right after it; below 0: forgotten",
    ),
    "forward_transfer": ("forward transfer", "score of a task just before it, less that before the first"),
    "forgetting": ("forgetting", "best score that a task ever had, less that at the end"),
    "intransigence": ("intransigence", "score when trained on all tasks at once, less that right after the task"),
    "general_delta": ("general delta", "mean score of the general sets at the end, less that before the first task"),
}
MEASURES = {"exact_match": "exact match", "loss": "minus the loss, in nats per token"}


def heatmap(report: Mapping[str, Any]) -> bytes:
    """PNG with a row for each model in the order of time and a column for each task, then each general set.

    The darker, the better: from 0 to 1 for exact match, over the losses that there are for a loss. What a task scored
    right after it was trained is framed. The same report gives the same bytes.
    """
    import numpy as np

    titles = row_titles(report)
    parts = [report[key] for key in ("tasks", "general") if report[key]["names"]]
    columns = [len(part["names"]) for part in parts]
    with picture(height=1.6 + 0.42 * len(titles)) as (figure, png):
        drawn = figure.subplots(1, len(parts), squeeze=False, width_ratios=columns, sharey=True)[0]
        for axes, part, key in zip(drawn, parts, ("tasks", "general"), strict=False):
            grid = np.array([[cell["value"] for cell in row] for row in part["scores"]], dtype=np.float64)
            known = grid[np.isfinite(grid)]
            by_loss = part["measure"] == "loss"
            ends = (0.0, 1.0) if not by_loss else (float(known.min(initial=0.0)), float(known.max(initial=1e-9)))
            shown = np.ma.masked_invalid(grid)
            axes.imshow(shown, cmap="Blues_r" if by_loss else "Blues", vmin=ends[0], vmax=ends[1], aspect="auto")
            for (row, column), value in np.ndenumerate(grid):
                dark = (value - ends[0]) / (ends[1] - ends[0]) > 0.6
                color = "white" if dark != by_loss else INK
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=9)
                if key == "tasks" and row == column + 1:
                    axes.add_patch(_frame(column, row))
            axes.set_xticks(range(len(part["names"])), part["names"], rotation=20, ha="right", fontsize=8)
            axes.set_yticks(range(len(titles)), titles)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.set_title(f"{'Tasks' if key == 'tasks' else 'General sets'}, {'loss' if by_loss else 'exact match'}")
    return png.getvalue()


def row_titles(report: Mapping[str, Any]) -> list[str]:
    """What the rows of the matrix are called: before the first task, then after each."""
    return [BEFORE, *(f"after {name}" for name in report["tasks"]["names"])]


def metric_lines(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Each metric as people read it: its title, value, interval and meaning."""
    lines = []
    for name, (title, meaning) in MEANINGS.items():
        if name in report["metrics"]:
            sign = "" if name == "average_accuracy" else "+"
            lines.append({"title": title, **_cell(report["metrics"][name], sign), "meaning": meaning})
    return lines


def render_page(report: Mapping[str, Any], image: bytes) -> str:
    """The report of a sequence as one page that loads nothing; `image`: its heatmap."""
    titles = {"tasks": "Tasks", "general": "General sets"}
    tables = [_table(report, report[key], title) for key, title in titles.items() if report[key]["names"]]
    return (
        page_templates()
        .get_template("continual.html.j2")
        .render(
            report=report,
            metrics=metric_lines(report),
            tables=tables,
            unit=MEASURES[report["tasks"]["measure"]],
            image=f"data:image/png;base64,{base64.b64encode(image).decode()}",
        )
    )


def _table(report: Mapping[str, Any], part: Mapping[str, Any], title: str) -> dict[str, Any]:
    rows = [
        {"title": row_title, "cells": [_cell(cell, "") for cell in row]}
        for row_title, row in zip(row_titles(report), part["scores"], strict=True)
    ]
    if part["joint"]:
        rows.append({"title": "all tasks at once", "cells": [_cell(cell, "") for cell in part["joint"]]})
    measure = "exact match" if part["measure"] == "exact_match" else "loss in nats per token"
    return {"title": f"{title}, by {measure}", "names": part["names"], "rows": rows}


def _cell(numbers: Mapping[str, Any], sign: str) -> dict[str, str]:
    value, ends = numbers["value"], numbers["interval"]
    return {
        "value": "–" if value is None else _typeset(f"{value:{sign}z.{DECIMALS}f}"),
        "interval": _typeset(Interval(*ends).text(DECIMALS, sign)) if ends else "",
    }


def _typeset(number: str) -> str:
    return number.replace("-", "−")


def _frame(column: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=1.4, clip_on=False)
