"""The options of the command line: what each command is for, and what it takes."""

import argparse
from pathlib import Path

COMMANDS = {
    "validate": "check the JSONL, split it, and write the dataset of the run",
    "tiers": "divide the LoRA parameters among the tiers",
    "train": "train the adapter",
    "evaluate": "score base, parent, champion and candidate on the new task and every retention set",
    "register": "register the adapter in MLflow, and promote it if the gate let it pass",
    "run": "all of these, one after the other",
    "commit": "put what a run left into DVC, and send it to a remote; in a DVC project, run does it at its end",
    "export": "write the adapter for PEFT, for mlx-lm, merged into the base, or as GGUF, and check what was written",
    "continual": "train tasks in sequence, each from the adapter before, and score every model on all of them",
    "generate": "answer prompts, with the candidate of a run or any other models",
    "chat": "talk to models side by side: the base, the parent and the candidate of a run",
    "deploy": "serve the retraining on a Prefect server, by a schedule and on its pages, until the process is ended",
    "versions": "list the versions of a registered model: what was kept, lineage, promotions",
    "compare": "compare two versions on every set that either was scored on",
    "promote": "make a version champion that the gate let pass",
    "rollback": "make the champion before the present one champion again",
    "status": "tell how a run stands, or all of them: step, losses, updates, tokens/s, time left",
    "ui": "start the pages of MLflow (at MLFLOW_PORT) and Prefect (PREFECT_SERVER_API_PORT) on this machine",
    "stop": "ask a run to stop at its next step, with a checkpoint, and wait until it has",
}
STAGES = ("validate", "tiers", "train", "evaluate", "register")
OF_A_RUN = ("status", "stop")
OF_THE_REGISTRY = ("versions", "compare", "promote", "rollback")
TALKS = ("generate", "chat")
FORMATS = ("peft", "mlx", "merged", "gguf")


def make_parser() -> argparse.ArgumentParser:
    """The parser of `nestune`, all its commands below it."""
    parser = argparse.ArgumentParser(
        prog="nestune", description="Fine-tune LoRA adapters on new data without losing what the model knew."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=f"{purpose[:1].upper()}{purpose[1:]}.")
        if name in OF_A_RUN:
            command.add_argument("run", metavar="RUN", nargs="?" if name == "status" else None, help="name of the run")
        elif name in OF_THE_REGISTRY:
            _add_registry_options(command, name)
        elif name == "continual":
            _add_continual_options(command)
        elif name != "ui":
            add_run_options(command, trains=name in ("train", "run"))
        if name == "deploy":
            _add_deploy_options(command)
        if name == "stop":
            command.add_argument("--wait", type=float, default=60.0, metavar="S", help="seconds to wait; default 60")
        if name == "evaluate":
            _add_evaluate_options(command)
        if name == "export":
            _add_export_options(command)
        if name in TALKS:
            _add_talk_options(command, name)
        if name not in ("deploy", "ui"):
            command.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def add_run_options(parser: argparse.ArgumentParser, trains: bool) -> None:
    """Add the options that say which run is meant; `trains`: also what becomes of its checkpoints."""
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML file of the run")
    parser.add_argument("--name", metavar="RUN", help="name of the run, in place of the file's")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. training.steps=20; repeatable"
    )
    if trains:
        parser.add_argument(
            "--force",
            action="store_true",
            help="train anew what another configuration has trained, or what is trained already",
        )
        parser.add_argument(
            "--resume",
            action="store_true",
            help="go on also on the other backend, or with more training.steps, whose cosine schedule then follows the "
            "new length; the same configuration goes on without being asked",
        )


def _add_continual_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configs", type=Path, nargs="+", metavar="FILE", help="YAML files of the tasks, in their order")
    parser.add_argument("--name", default="continual", metavar="SEQUENCE", help="its report is in runs/<name>")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="in every task, e.g. training.steps=20"
    )
    parser.add_argument("--joint", metavar="ADAPTER", help="one that was trained on all tasks at once, to compare with")
    parser.add_argument(
        "--force", action="store_true", help="train all tasks anew, also what another configuration has trained"
    )


def _add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        metavar="ADAPTER",
        help="score only this one, on the same sets, with no gate: a folder, models:/<name>@<alias>, or base",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="with --adapter: write the scores there as JSON")
    parser.add_argument(
        "--lm-eval",
        action="append",
        metavar="TASK",
        help="with --adapter: also score it on a task of lm-evaluation-harness; repeatable",
    )
    parser.add_argument("--lm-eval-path", metavar="FOLDER", help="where task files of one's own are")


def _add_talk_options(parser: argparse.ArgumentParser, command: str) -> None:
    if command == "generate":
        parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what is asked")
        parser.add_argument(
            "--file",
            type=Path,
            metavar="FILE",
            help='JSONL with more to ask, {"prompt": "..."} or {"messages": [...]} a line; /dev/stdin reads a pipe',
        )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="ADAPTER",
        help="who answers: base, parent, candidate, a folder, or models:/<name>@<alias>; repeatable",
    )
    parser.add_argument(
        "--max-tokens", type=_positive, metavar="N", help="tokens of an answer; default evaluation.max_answer_tokens"
    )


def _add_deploy_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cron", metavar="WHEN", help="e.g. '0 3 * * 1', Mondays at three; none: only when asked to")
    parser.add_argument("--timezone", metavar="ZONE", help="of the schedule, e.g. Europe/Berlin; default UTC")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _add_export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", required=True, choices=FORMATS, help="what the adapter becomes")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--checkpoint", choices=("best", "final"), help="in place of the candidate, which is made of one"
    )
    which.add_argument("--adapter", metavar="ADAPTER", help="another one: a folder, or models:/<name>@<alias>")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="by default runs/<name>/export/<to>")
    parser.add_argument("--force", action="store_true", help="replace an earlier export there")
    parser.add_argument(
        "--dequantize", action="store_true", help="merge on a base quantized by MLX, as a model of floats"
    )


def _add_registry_options(parser: argparse.ArgumentParser, command: str) -> None:
    if command == "compare":
        parser.add_argument("first", metavar="VERSION", help="number of a version")
        parser.add_argument("second", metavar="VERSION", help="number of the other one")
    if command == "promote":
        parser.add_argument("version", metavar="VERSION", help="number of the version")
        parser.add_argument("--force", action="store_true", help="pass over the gate; --reason says why")
    if command == "rollback":
        parser.add_argument("--to", metavar="VERSION", help="an earlier champion; by default the one before")
    if command in ("promote", "rollback"):
        parser.add_argument("--reason", default="", metavar="TEXT", help="kept with the promotion")
    parser.add_argument("--model", metavar="NAME", help="registered model; by default the only one that MLflow has")
    parser.add_argument(
        "--tracking-uri",
        metavar="URI",
        help="MLflow server or database; default: MLFLOW_TRACKING_URI, else SQLite in mlflow/",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="take both from the YAML file of a run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="with --config, e.g. registry.tracking_uri=..."
    )


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"nestune {version('nestune')}")
        parser.exit()
