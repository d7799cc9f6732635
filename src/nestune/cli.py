"""The command line: one command a stage, and `nestune run` for all of them."""

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nestune.cli_parser import OF_A_RUN, OF_THE_REGISTRY, STAGES, TALKS, make_parser
from nestune.errors import ConfigError, NestuneError, StoppedError
from nestune.stages.result import Result

if TYPE_CHECKING:
    from nestune.config import RunConfig
    from nestune.runs import RunPaths


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns 0, 2 for wrong input, 1 for a failure, 3 when the run was stopped on request."""
    options = make_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    from nestune.environment import set_defaults

    set_defaults()
    return exit_code_of(lambda: _action(options)(options))


def _action(options: argparse.Namespace) -> Callable[[argparse.Namespace], None]:
    if options.command in OF_A_RUN:
        return _of_a_run
    if options.command in OF_THE_REGISTRY:
        return _of_the_registry
    if options.command in TALKS:
        return _talk
    if options.command == "continual":
        return _continual
    if options.command == "deploy":
        return _deploy
    if options.command == "ui":
        return _ui
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
            from nestune.stages.commit import commits

            if commits(config):
                stages = (*stages, "commit")
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


def _talk(options: argparse.Namespace) -> None:
    from nestune.config import load_config
    from nestune.runs import RunPaths
    from nestune.stages.talk import chat, generate, side_by_side

    def tell(said: Mapping[str, str]) -> None:
        print(json.dumps(said) if options.json else "\n".join(side_by_side(said)), flush=True)

    config = load_config(options.config, options.set, options.name)
    run = RunPaths.of(config.name)
    if options.command == "generate":
        _print(generate(config, run, options.prompts, options.adapter, options.max_tokens, options.file), options)
        return
    if sys.stdin.isatty():
        print("/new begins anew, Ctrl-D ends", file=sys.stderr)
    chat(config, run, sys.stdin, tell, options.adapter, options.max_tokens)


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


def _deploy(options: argparse.Namespace) -> None:
    from nestune.config import load_config
    from nestune.flows.serving import deploy

    deploy(load_config(options.config, options.set, options.name), options.cron, options.timezone)


def _ui(_: argparse.Namespace) -> None:
    from nestune.ui import serve_pages

    serve_pages()


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

    if options.config is not None and (options.model or options.tracking_uri):
        raise ConfigError("--config says which registry is meant; leave out --model and --tracking-uri, or use --set")
    if options.config is None and options.set:
        raise ConfigError("--set goes with --config; without it, use --model and --tracking-uri")
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
    if name == "commit":
        from nestune.stages.commit import commit

        return commit
    from nestune.stages.register import register

    return register


if __name__ == "__main__":
    sys.exit(main())
