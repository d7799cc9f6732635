"""How benchmarks/retention.py shows what it found: tables for the terminal and for a page, and the picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from report import print_table
from retention_summary import ENOUGH, TIE, Bar

Row = Mapping[str, Any]
Table = tuple[str, list[str], list[list[str]], list[str]]
RULES = [
    "new, general: exact match on rows that chose nothing, at the chosen strength (full: as training ended), mean over "
    "seeds; strength: the factor, chosen by one rule for all.",
    f"reached: seeds on which new >= {ENOUGH} was reached on the rows that choose, at full strength, and the mean CPU "
    "seconds of training until then, the teacher's texts included, scoring not. all s: those of the whole training.",
    "difference: of general from the best plain LoRA (that which keeps most of those that reach the target on every "
    f"seed), strength chosen for both, paired by seed, with its 95 % interval; below {TIE} it is a tie. x plain: its "
    "CPU seconds to the target, over that one's; ms: CPU milliseconds of a step.",
]
SEQUENCE_RULES = [
    "n: sequences. accuracy: average accuracy; backward: backward transfer; forgot: forgetting; all of exact match "
    "after the last task, in brackets 95 % intervals over sequences. x joint: over joint training's, same seed.",
    "general: all general rows at the end. uncovered: facts that no replayed row and no task touches; unmentioned: of "
    "these, those that no text of the teacher mentions, and how many rows these are.",
    "ms: CPU milliseconds of a step, mean over the tasks. third s: CPU seconds of the third task, with the teacher's "
    "texts and the choice of the strength; x joint: over all of joint training.",
]


def one_task_table(rows: Sequence[Row], seeds: int) -> Table:
    """The methods on one task."""
    columns = ["method", "full: new", "general", "new", "general", "strength", "difference", "verdict"]
    columns += ["reached", "CPU s", "x plain", "all s", "ms"]
    shown = [
        [
            row["method"],
            *(number(row["full"][name]) for name in ("new", "general")),
            *(number(row["chosen"][name]) for name in ("new", "general")),
            number(row["factor"], 2),
            with_interval({"value": row["difference"], "interval": row["interval"]}, "+"),
            row["verdict"],
            f"{row['reached']} of {len(row['seeds'])}",
            number(row["cpu_to_target_s"], 1),
            number(row["cpu_ratio"], 2),
            number(row["train_cpu_s"], 1),
            number(row["step_cpu_s"] * 1000, 0),
        ]
        for row in rows
    ]
    return f"One task, {seeds} seeds", columns, shown, RULES


def sequence_table(rows: Sequence[Row]) -> Table:
    """The methods on sequences."""
    columns = ["method", "n", "accuracy", "x joint", "backward", "forgot", "general"]
    columns += ["uncovered", "unmentioned", "ms", "third s", "x joint"]
    shown = []
    for row in rows:
        unmentioned = row["unmentioned"]
        shown.append(
            [
                row["method"],
                str(row["sequences"]),
                with_interval(row["average_accuracy"]),
                number(row["of_joint"]["value"]),
                with_interval(row["backward_transfer"], "+"),
                number(row["forgetting"]["value"], 3, "+"),
                number(row["general"]["value"]),
                with_interval(row["uncovered"]),
                f"{unmentioned['share']:.3f} of {unmentioned['rows']}" if unmentioned else "",
                number(scaled(row["step_cpu_s"]["value"], 1000), 0),
                number(row["last_cpu_s"]["value"], 1),
                number(row["cost_of_joint"]["value"], 2),
            ]
        )
    return "A sequence of three tasks", columns, shown, SEQUENCE_RULES


def bars_table(bars: Sequence[Bar]) -> Table:
    """What was promised, and whether it holds."""
    shown = [
        [bar.what, f"{'>=' if bar.at_least else '<='} {bar.bar:g}", number(bar.value), verdict(bar)] for bar in bars
    ]
    return "Bars", ["bar", "promised", "measured", "verdict"], shown, []


def verdict(bar: Bar) -> str:
    """What a bar is called; what was not measured is as good as missed for the exit code."""
    return "met" if bar.met else "not measured" if bar.value is None else "MISSED"


def show(tables: Sequence[Table], notes: Sequence[str]) -> None:
    """Print the tables."""
    for number_, (title, columns, rows, rules) in enumerate(tables, start=1):
        print_table(title, columns, rows, [*rules, *(notes if number_ == len(tables) else [])])


def markdown(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """The tables as Markdown, notes first."""
    parts = ["\n".join(notes)]
    for title, columns, rows, rules in tables:
        lines = [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows)]
        parts += [f"## {title}", "\n".join(lines), "\n".join(f"- {rule}" for rule in rules)]
    return "\n\n".join(part for part in parts if part) + "\n"


def figure(rows: Sequence[Row], file: Path) -> None:
    """Draw learning against forgetting: each method at full strength and, joined to it, at the chosen one."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(12, 7), layout="constrained")
    axes = picture.subplots()
    groups = list(dict.fromkeys(row["group"] for row in rows))
    for place, row in enumerate(rows, start=1):
        colour = f"C{groups.index(row['group'])}"
        points = [(row[at]["new"], row[at]["general"]) for at in ("full", "chosen")]
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=0.8, alpha=0.6)
        axes.plot(*points[0], marker="o", color=colour, fillstyle="none")
        axes.plot(*points[1], marker="o", color=colour, linestyle="", label=f"{place:2d}  {row['method']}")
        axes.annotate(str(place), points[1], xytext=(4, 3), textcoords="offset points", fontsize=8)
    axes.axvline(ENOUGH, color="0.7", linestyle=":")
    axes.set_xlabel("new task: exact match (learned)")
    axes.set_ylabel("general: exact match (kept)")
    axes.set_title("Learning and forgetting; open: as training ended, filled: at the chosen strength")
    picture.legend(loc="outside right upper", fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(file, dpi=120, metadata={"Software": None})


def number(value: float | None, decimals: int = 3, sign: str = "") -> str:
    """A number, or nothing where there is none."""
    return "" if value is None else f"{value:{sign}.{decimals}f}"


def scaled(value: float | None, factor: float) -> float | None:
    """A number times a factor."""
    return None if value is None else value * factor


def between(interval: Sequence[float] | None, sign: str = "") -> str:
    """An interval, or nothing."""
    return "" if interval is None else f"[{interval[0]:{sign}.2f}, {interval[1]:{sign}.2f}]"


def with_interval(figure_: Mapping[str, Any], sign: str = "") -> str:
    """A figure and its interval."""
    return f"{number(figure_['value'], 3, sign)} {between(figure_['interval'], sign)}".strip()
