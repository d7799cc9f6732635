"""Prefect flow: from JSONL to a registered adapter, a task for each stage.

    python flows/retrain.py --config configs/demo_nestune.yaml [--from-champion | --serve]

No Prefect server is needed: without one, Prefect starts its own for the time of the run.
"""

# ruff: noqa: E402 - the environment is settled before Prefect reads its settings
import argparse
import sys

from nestune.environment import set_defaults

set_defaults()

from nestune.cli import exit_code_of
from nestune.cli_parser import add_run_options
from nestune.config import load_config
from nestune.flows.retrain import retrain, run_once
from nestune.flows.serving import deploy
from nestune.flows.terminal import behave_on_a_terminal

__all__ = ["main", "retrain"]


def main(arguments: list[str] | None = None) -> int:
    """Run the flow once; returns 0, 2 for wrong input, 1 for a failure, 3 when the run was stopped on request."""
    parser = argparse.ArgumentParser(description="From JSONL to a registered adapter, as a Prefect flow.")
    add_run_options(parser, trains=True)
    parser.add_argument(
        "--from-champion",
        action="store_true",
        help="start from the champion, on what has arrived since it was trained; nothing new: ends at once",
    )
    parser.add_argument(
        "--serve", action="store_true", help="do not run it: have it started, stopped and watched on Prefect's pages"
    )
    options = parser.parse_args(arguments)
    if options.serve and (options.force or options.resume):
        parser.error("--force and --resume are asked for in the form of each run, not with --serve")
    if options.serve:
        return exit_code_of(
            lambda: deploy(load_config(options.config, options.set, options.name), from_champion=options.from_champion)
        )
    behave_on_a_terminal()
    return exit_code_of(
        lambda: run_once(
            load_config(options.config, options.set, options.name),
            options.force,
            options.resume,
            options.from_champion,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
