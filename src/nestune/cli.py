"""The command line: one command a stage, and `nestune run` for all of them."""

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nestune.errors import ConfigError, NestuneError, StoppedError

if TYPE_CHECKING:
    from nestune.config import RunConfig
    from nestune.runs import RunPaths

COMMANDS = {
    "validate": "check the JSONL, split it, and write the dataset of the run",
    "tiers": "divide the LoRA parameters among the tiers",
    "train": "train the adapter",
    "evaluate": "score base, parent, champion and candidate on the new task and every retention set",
    "register": "register the adapter in MLflow, and promote it if the gate let it pass",
    "run": "all of these, one after the other",
    "export": "write the adapter for PEFT, for mlx-lm, merged into the base, or as GGUF, and check what was written",
    "continual": "train tasks in sequence, each from the adapter before, and score every model on all of them",
    "versions": "list the versions of a registered model: what was kept, lineage, promotions",
    "compare": "compare two versions on every set that either was scored on",
    "promote": "make a version champion that the gate let pass",
    "rollback": "make the champion before the present one champion again",
    "status": "tell how a run stands, or all of them: step, losses, updates, tokens/s, time left",
    "stop": "ask a run to stop at its next step, with a checkpoint, and wait until it has",
}
STAGES = ("validate", "tiers", "train", "evaluate", "register")
OF_A_RUN = ("status", "stop")
OF_THE_REGISTRY = ("versions", "compare", "promote", "rollback")
FORMATS = ("peft", "mlx", "merged", "gguf")


class Result(Protocol):
    """What every stage returns."""

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        ...

    def summary(self) -> list[str]:
        """The result for a person, a line each."""
        ...


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns 0, 2 for wrong input, 1 for a failure, 3 when the run was stopped on request."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    from nestune.environment import set_defaults

    set_defaults()
    return exit_code_of(lambda: _action(options)(options))


def _action(options: argparse.Namespace) -> Callable[[argparse.Namespace], None]:
    if options.command in OF_A_RUN:
        return _of_a_run
    if options.command in OF_THE_REGISTRY:
        return _of_the_registry
    if options.command == "continual":
        return _continual
    if options.command == "evaluate" and (options.adapter or options.out or options.lm_eval):
        return _evaluate_adapter
    return _run


def exit_code_of(action: Callable[[], object]) -> int:
    """Do it; 0, or the exit code of an error that the user can act on, which is printed without a traceback."""
    # An ordinary exit, so that what was begun is ended: the tracked run, Prefect's temporary server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        action()
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has heard enough; when it ends, Python would try once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except NestuneError as error:
        print(error if isinstance(error, StoppedError) else f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}. Check permissions and free space.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


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
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow server or database; by default SQLite in mlflow/")
    parser.add_argument("--config", type=Path, metavar="FILE", help="take both from the YAML file of a run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="with --config, e.g. registry.tracking_uri=..."
    )


def _run(options: argparse.Namespace) -> None:
    from nestune.config import load_config
    from nestune.run_state import owned, recorded
    from nestune.runs import RunPaths

    config = load_config(options.config, options.set, options.name)
    run = RunPaths.of(config.name)
    stages: tuple[str, ...] = STAGES if options.command == "run" else (options.command,)
    results: dict[str, Any] = {}
    if options.command in ("train", "run"):
        from nestune.stages.dead_runs import end_dead_runs

        end_dead_runs()
    with owned(run, f"nestune {options.command} --name {config.name}"):
        if options.command == "run":
            from nestune.stages.finished import check_before_running

            finished = check_before_running(config, run, options.force, options.resume)
            if finished is not None:
                stages, results["register"] = (), finished.as_dict()
                if not options.json:
                    print("run:", *finished.summary(), sep="\n  ", flush=True)
        for stage in stages:
            with recorded(run, stage):
                result = _stage(stage, options)(config, run)
            results[stage] = result.as_dict()
            if not options.json:
                print(f"{stage}:", *result.summary(), sep="\n  ", flush=True)
    if options.json:
        print(json.dumps(results if options.command == "run" else results[options.command], indent=2))


def _evaluate_adapter(options: argparse.Namespace) -> None:
    from nestune.config import load_config
    from nestune.runs import RunPaths
    from nestune.stages.evaluate_adapter import evaluate_adapter

    if options.adapter is None:
        raise ConfigError(
            "--out and --lm-eval go with --adapter; the evaluation of a run is in runs/<name>/evaluation, "
            "and asks of lm-evaluation-harness what evaluation.lm_eval says"
        )
    overrides = list(options.set)
    if options.lm_eval:
        asked = {"tasks": options.lm_eval, "path": options.lm_eval_path}
        overrides.append(f"evaluation.lm_eval={json.dumps(asked)}")
    config = load_config(options.config, overrides, options.name)
    _print(evaluate_adapter(config, RunPaths.of(config.name), options.adapter, options.out), options)


def _continual(options: argparse.Namespace) -> None:
    from nestune.config import load_config
    from nestune.stages.continual import continual
    from nestune.stages.dead_runs import end_dead_runs

    def tell(title: str, lines: Sequence[str]) -> None:
        if not options.json:
            print(f"{title}:", *lines, sep="\n  ", flush=True)

    configs = [load_config(path, options.set) for path in options.configs]
    end_dead_runs()
    _print(continual(configs, options.name, options.joint, options.force, tell), options)


def _print(result: Result, options: argparse.Namespace) -> None:
    print(json.dumps(result.as_dict(), indent=2) if options.json else "\n".join(result.summary()))


def _of_a_run(options: argparse.Namespace) -> None:
    from nestune.runs import RunPaths

    run = RunPaths.of(options.run) if options.run is not None else None
    if options.command == "status":
        from nestune.stages.status import status

        result: Result = status(run)
    else:
        from nestune.stages.stop import stop

        assert run is not None, "the parser asks for it"
        result = stop(run, options.wait)
    _print(result, options)


def _of_the_registry(options: argparse.Namespace) -> None:
    from nestune.config import load_config
    from nestune.registry.versions import named_registry
    from nestune.stages.promote import promote, rollback
    from nestune.stages.versions import compare, versions

    if options.config is not None:
        registry = load_config(options.config, options.set).registry
    else:
        registry = named_registry(options.model, options.tracking_uri)
    if options.command == "versions":
        result: Result = versions(registry)
    elif options.command == "compare":
        result = compare(registry, options.first, options.second)
    elif options.command == "promote":
        result = promote(registry, options.version, options.force, options.reason)
    else:
        result = rollback(registry, options.reason, options.to)
    _print(result, options)


def _stage(name: str, options: argparse.Namespace) -> Callable[["RunConfig", "RunPaths"], Result]:
    """The function of a stage; imported only now, as each pulls in what the others do not need."""
    if name == "validate":
        from nestune.stages.validate import validate

        return validate
    if name == "tiers":
        from nestune.stages.assign import assign

        return assign
    if name == "train":
        from nestune.stages.train import train

        return lambda config, run: train(config, run, force=options.force, resume=options.resume)
    if name == "evaluate":
        from nestune.stages.evaluate import evaluate

        return evaluate
    if name == "export":
        from nestune.stages.export import export

        chosen = {key: getattr(options, key) for key in ("checkpoint", "adapter", "out", "force", "dequantize")}
        return lambda config, run: export(config, run, options.to, **chosen)
    from nestune.stages.register import register

    return register


def _parser() -> argparse.ArgumentParser:
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
        else:
            add_run_options(command, trains=name in ("train", "run"))
        if name == "stop":
            command.add_argument("--wait", type=float, default=60.0, metavar="S", help="seconds to wait; default 60")
        if name == "evaluate":
            _add_evaluate_options(command)
        if name == "export":
            _add_export_options(command)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"nestune {version('nestune')}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
