"""The demo: the same new facts learned twice, as plain LoRA and as nestune recommends, each through the gate.

    python demo/run.py [--backend auto|torch|mlx]

Makes data/ where it is missing, runs the Prefect flow for both configurations, and prints one table.
"""

# ruff: noqa: E402 - the environment is settled before Prefect reads its settings
import argparse
import sys
import time
from pathlib import Path
from typing import Any

from nestune.environment import set_defaults

set_defaults()

from nestune.cli import exit_code_of
from nestune.config import RunConfig, load_config
from nestune.files import read_json
from nestune.flows.retrain import run_once
from nestune.flows.terminal import behave_on_a_terminal
from nestune.runs import RunPaths
from world import write_world

DATA = Path("data")
CONFIGS = {"plain LoRA": Path("configs/demo_plain.yaml"), "nestune": Path("configs/demo_nestune.yaml")}


def main() -> None:
    """Run the demo from the project's root; it goes through whatever the gate decides."""
    parser = argparse.ArgumentParser(description="New facts learned twice: as plain LoRA, and as nestune recommends.")
    parser.add_argument("--backend", choices=["auto", "torch", "mlx"], default="auto", help="framework that trains")
    backend = parser.parse_args().backend
    began = time.monotonic()
    behave_on_a_terminal()
    if not DATA.exists():
        write_world(DATA)
    # Whoever looks at the demo only is left no files for git to keep.
    overrides = [f"model.backend={backend}", "dvc.commit=false"]
    configs = {title: load_config(path, overrides) for title, path in CONFIGS.items()}
    for title, config in configs.items():
        print(f"\n── {title}: {CONFIGS[title]} ──", flush=True)
        run_once(config, force=True)
    _print_story(configs)
    print(f"\nDone in {time.monotonic() - began:.0f} s.")


def _print_story(configs: dict[str, RunConfig]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    reports = {title: _read(config, "evaluation/report.json") for title, config in configs.items()}
    versions = {title: _read(config, "registration.json") for title, config in configs.items()}
    first = next(iter(reports.values()))
    columns = {"base": first["scores"]["base"]} | {t: report["scores"]["candidate"] for t, report in reports.items()}
    table = Table(box=box.SIMPLE_HEAD, title="Questions answered word for word, greedy", title_justify="left")
    table.add_column("held-out set")
    for title in columns:
        table.add_column(title, justify="right")
    for name in columns["base"]:
        what = "new task" if name == "new_task" else f"kept: {name}"
        table.add_row(what, *(f"{scores[name]['exact_match']:.1%}" for scores in columns.values()))
    table.add_section()
    table.add_row("gate", "", *("passed" if r["passed"] else "refused" for r in reports.values()))
    table.add_row("version", "", *(f"{v['model']} {v['version']}" for v in versions.values()))
    table.add_row("champion", "", *("yes" if v["promoted"] else "no" for v in versions.values()))
    console = Console()
    console.print(table)
    for title, version in versions.items():
        console.print(f"[bold]{title}[/]: {version['reason']}", highlight=False, soft_wrap=True)
    console.print("\nWhere to look:", highlight=False)
    for config in configs.values():
        console.print(f"  {RunPaths.of(config.name).evaluation}/report.html", highlight=False)
    console.print(f"  models:/{version['model']}@champion  in MLflow:  make ui", highlight=False)
    console.print("  the flow's runs               in Prefect: make ui", highlight=False)


def _read(config: RunConfig, file: str) -> Any:
    return read_json(RunPaths.of(config.name).root / file, "Run make demo again.")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
