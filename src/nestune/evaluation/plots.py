"""The pictures of an evaluation, as PNG bytes: loss curves, tier updates, retention bars.

The same numbers give the same bytes. Colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nestune.config import GateConfig
from nestune.evaluation.gate import lowest_passing
from nestune.evaluation.history import History
from nestune.evaluation.scores import Scores, columns
from nestune.tiers.picture import TIER_COLORS
from nestune.tiers.schedule import describe_period

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#333333", "#d9d9d9"
MODEL_COLORS = {"base": "#bbbbbb", "parent": "#56b4e9", "champion": "#0072b2", "candidate": "#e69f00"}
MODEL_COLORS["uncompressed"] = "#cc79a7"
WIDTH = 8.0  # inches
DPI = 120
LIMIT = "the gate's limit"
CHOSEN: dict[str, Any] = {"color": MODEL_COLORS["candidate"], "marker": "o", "markersize": 10, "linestyle": "none"}
SHOWN_STEPS = (16, 96)  # fewest and most steps in the picture of due tiers
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine draws the same
    "font.size": 10,
    "text.color": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


def loss_curves(history: History) -> bytes:
    """The training loss of each step, thin, its running mean, and the validation loss."""
    with picture(height=3.6) as (figure, png):
        axes = figure.subplots()
        window = max(1, len(history.steps) // 30)
        axes.plot(history.steps, history.loss, color=MODEL_COLORS["champion"], linewidth=0.6, alpha=0.35)
        label = f"train, mean of {window} steps" if window > 1 else "train"
        smooth = _running_mean(history.loss, window)
        axes.plot(history.steps, smooth, color=MODEL_COLORS["champion"], linewidth=1.8, label=label)
        axes.plot(
            history.valid_steps,
            history.valid_loss,
            color=TIER_COLORS[0],
            linewidth=1.8,
            marker="o",
            markersize=4 if len(history.valid_steps) <= 40 else 0,
            label="held out",
            clip_on=False,  # a marker on the edge is shown whole
        )
        axes.set(title="Loss", xlabel="step", ylabel="nats per token")
        axes.set_ylim(loss_limits([*history.loss, *history.valid_loss]))
        axes.set_xlim(min(history.steps) - 0.5, max(*history.steps, *history.valid_steps) + 0.5)
        _whole_numbers(axes.xaxis)
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)
    return png.getvalue()


def tier_updates(history: History, periods: Sequence[int | None]) -> bytes:
    """Which tiers were due at each of the first steps, and how often each was updated over all of them."""
    tiers, steps = range(len(periods)), history.steps
    shown = min(len(steps), max(SHOWN_STEPS[0], min(2 * max(filter(None, periods)), SHOWN_STEPS[1])))
    with picture(height=2.0 + 0.5 * len(tiers)) as (figure, png):
        due, counts = figure.subplots(1, 2, width_ratios=(1.4, 1))
        for tier in tiers:
            color = TIER_COLORS[tier]
            starts = [steps[place] - 0.42 for place in range(shown) if tier in history.due[place]]
            due.barh([tier] * len(starts), 0.84, 0.6, left=starts, color=color)
            course = [count[tier] for count in history.update_counts]
            # Thinner for slower tiers, so that lines that coincide can all be seen.
            counts.step(steps, course, where="post", color=color, linewidth=1.6 + 1.2 * (tiers[-1] - tier))
        labels = [
            f"tier {tier}, {describe_period(period)}\nupdates: {history.update_counts[-1][tier]}"
            for tier, period in enumerate(periods)
        ]
        due.set(title="Tiers due" if shown == len(steps) else f"Tiers due, first {shown} steps", xlabel="step")
        due.set_yticks(tiers, labels)
        due.set_xlim(steps[0] - 0.8, steps[shown - 1] + 0.8)
        due.set_ylim(len(tiers) - 0.5, -0.5)
        due.tick_params(left=False)
        due.spines["left"].set_visible(False)
        counts.set(title="Updates over all steps", xlabel="step", ylim=(0, None))
        counts.set_xlim(steps[0] - 1, steps[-1])
        counts.grid(axis="y", color=FAINT, linewidth=0.6)
        for axis in (due.xaxis, counts.xaxis, counts.yaxis):
            _whole_numbers(axis)
    return png.getvalue()


def retention_bars(scores: Scores, gate: GateConfig) -> bytes:
    """Each model's score on each set, with the gate's limit; sets without answers by their loss.

    What is beyond the limit still passes where noise explains it.
    """
    titles = columns(scores)
    panels: dict[str, list[str]] = {}
    for name, score in sorted(scores["candidate"].items(), key=lambda item: item[1].measure):
        panels.setdefault(score.measure, []).append(name)
    sizes = [len(names) for names in panels.values()]
    with picture(height=sum(sizes) * (0.2 * len(titles) + 0.25) + len(sizes) * 0.6 + 0.4) as (figure, png):
        column = figure.subplots(len(panels), 1, squeeze=False, height_ratios=sizes)[:, 0]
        for axes, (measure, names) in zip(column, panels.items(), strict=True):
            for place, name in enumerate(names):
                _draw_set(axes, place, name, titles, scores, gate)
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.tick_params(left=False)
            axes.spines["left"].set_visible(False)
            axes.grid(axis="x", color=FAINT, linewidth=0.6)
            if measure == "exact_match":
                axes.set(title="Answers that match exactly", xlim=(0, 1.08))
                axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
            else:
                axes.set(title="Loss in nats per token, less is better", xlim=(0, axes.get_xlim()[1] * 1.06))
        handles, labels = column[0].get_legend_handles_labels()
        handle_of = dict(zip(labels, handles, strict=True))
        order = [label for label in [*titles, LIMIT] if label in handle_of]
        handles = [handle_of[label] for label in order]
        figure.legend(handles, order, loc="outside lower center", ncols=len(order))
    return png.getvalue()


def strength_curve(strength: Mapping[str, Any]) -> bytes:
    """Learning and divergence from the parent over the factor, with the one that was chosen; as `strength.json`."""
    curve = strength["curve"]
    factors = [point["factor"] for point in curve]
    with picture(height=3.4) as (figure, png):
        learned, apart = figure.subplots(1, 2)
        label = "exact match" if strength["measure"] == "exact_match" else "nats per token"
        parts = (
            (learned, "score", "New task, on rows that choose", label),
            (apart, "divergence", "KL from parent", ""),
        )
        for axes, key, title, unit in parts:
            values = [math.nan if point[key] is None else point[key] for point in curve]
            axes.plot(factors, values, color=MODEL_COLORS["champion"], linewidth=1.8, marker="o", markersize=4)
            chosen = values[factors.index(strength["factor"])]
            axes.plot([strength["factor"]], [chosen], **CHOSEN, label=f"chosen: {strength['factor']:g}")
            axes.set(title=title, xlabel="strength", ylabel=unit or "nats per position", xlim=(-0.03, 1.03))
            axes.grid(axis="y", color=FAINT, linewidth=0.6)
        if strength["parent"] is not None:
            learned.axhline(strength["parent"], color=MODEL_COLORS["parent"], linewidth=1.4, label="parent")
        learned.legend(loc="best")
        apart.set_ylim(0, None)
    return png.getvalue()


def loss_limits(losses: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis that shows every finite loss: from 0 up where they fell by half, else close around them."""
    finite = [loss for loss in losses if math.isfinite(loss)] or [0.0]
    low, high = min(finite), max(finite)
    air = max(0.06 * (high - low), 0.005 * high, 0.001)
    return (0.0 if low <= high / 2 else low - air), high + air


def _draw_set(axes: "Axes", place: int, name: str, titles: Mapping[str, str], scores: Scores, gate: GateConfig) -> None:
    """One group of bars, around `place` on the vertical axis, and the gate's limit across it."""
    thickness = 0.8 / len(titles)
    for row, (title, model) in enumerate(titles.items()):
        score = scores[model][name]
        length = score.value if math.isfinite(score.value) else 0.0
        middle = place - 0.4 + (row + 0.5) * thickness
        color = MODEL_COLORS[title.rpartition(" ")[2]]
        bar = axes.barh(middle, length, thickness * 0.88, color=color, label=title)
        axes.bar_label(bar, [f"{score.value:.2f}"], padding=3, fontsize=8)
    limit = lowest_passing(scores, name, gate)
    if math.isfinite(limit):
        span = (place - 0.44, place + 0.44)
        axes.vlines(limit, *span, color=INK, linewidth=1.6, linestyle=(0, (3, 1.5)), label=LIMIT)


@contextmanager
def picture(height: float) -> Iterator[tuple["Figure", io.BytesIO]]:
    """A figure to draw on, and the PNG that it becomes when the block ends."""
    import matplotlib
    from matplotlib.figure import Figure

    png = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
        yield figure, png
        # Without the name and version of the software, which would change the bytes.
        figure.savefig(png, format="png", metadata={"Software": None})


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of the `window` values around each one, of fewer at both ends."""
    before, after = window // 2, (window + 1) // 2
    around = [values[max(0, place - before) : place + after] for place in range(len(values))]
    return [sum(near) / len(near) for near in around]


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
