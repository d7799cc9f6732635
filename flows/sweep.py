"""Prefect flow: a run for every point of a grid, and the best of them registered.

python flows/sweep.py --config configs/demo_nestune.yaml --grid training.learning_rate='[1.0e-3, 2.0e-3]'
"""

# ruff: noqa: E402 - the environment is settled before Prefect reads its settings
import argparse
import sys
from typing import Any

from nestune.environment import set_defaults

set_defaults()

from nestune.cli import exit_code_of
from nestune.cli_parser import add_run_options
from nestune.config.yaml_text import read_yaml
from nestune.errors import ConfigError
from nestune.flows.sweep import sweep, sweep_once
from nestune.flows.terminal import behave_on_a_terminal

__all__ = ["main", "sweep"]


def main(arguments: list[str] | None = None) -> int:
    """Run the sweep; returns 0, 2 for wrong input, 1 for a failure, 3 when a run was stopped on request."""
    parser = argparse.ArgumentParser(description="The same run with every combination of some settings.")
    add_run_options(parser, trains=False)
    parser.add_argument(
        "--grid", action="append", required=True, metavar="KEY=[VALUE, ...]", help="values to try; repeatable"
    )
    options = parser.parse_args(arguments)
    behave_on_a_terminal()
    return exit_code_of(lambda: sweep_once(options.config, _grid(options.grid), options.set, options.name))


def _grid(given: list[str]) -> dict[str, list[Any]]:
    grid: dict[str, list[Any]] = {}
    for one in given:
        key, _, text = one.partition("=")
        try:
            values = read_yaml(text)
        except ValueError:
            values = None
        if not isinstance(values, list):
            raise ConfigError(f"--grid {one!r:.80} is not KEY=[VALUE, ...], e.g. training.steps='[100, 200]'")
        grid[key] = values
    return grid


if __name__ == "__main__":
    sys.exit(main())
