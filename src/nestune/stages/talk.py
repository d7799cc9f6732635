"""`nestune generate` and `nestune chat`: what models say, side by side: the base, a run's parent, its candidate."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestune.backends.factory import make_backend
from nestune.base_model import resolve_base
from nestune.config import RunConfig
from nestune.data.questions import Question, check_questions, read_questions
from nestune.data.tokens import load_tokenizer
from nestune.errors import ConfigError
from nestune.evaluation.answers import answer
from nestune.registry.versions import resolve_adapter
from nestune.runs import RunPaths

BASE, PARENT, CANDIDATE = "base", "parent", "candidate"
ANEW = "/new"


@dataclass(frozen=True)
class GenerateResult:
    """Questions, and the answer of each model to each of them, by the model's name."""

    prompts: tuple[Question, ...]
    answers: Mapping[str, tuple[str, ...]]

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        return {"prompts": list(self.prompts), "answers": {name: list(said) for name, said in self.answers.items()}}

    def summary(self) -> list[str]:
        """The result for a person: the answer alone where there is one, else all with the names of the models."""
        if len(self.answers) == len(self.prompts) == 1:
            return list(*self.answers.values())
        lines = []
        for place, prompt in enumerate(self.prompts):
            lines += [f"> {text}" for text in _turns_of(prompt)]
            lines += side_by_side({name: said[place] for name, said in self.answers.items()})
        return lines


def generate(
    config: RunConfig,
    run: RunPaths,
    prompts: Sequence[str],
    models: Sequence[str] = (),
    max_tokens: int | None = None,
    file: Path | None = None,
) -> GenerateResult:
    """The greedy answers of models to prompts, as a served version of them would answer.

    models: `base`, `parent`, `candidate`, folders of adapters or `models:/` addresses; by default the candidate of the
    run, or the base where there is none. max_tokens: by default `evaluation.max_answer_tokens`. file: JSONL with more
    questions, `{"prompt": ...}` or `{"messages": [...]}` a line. Raises ConfigError when there is no such model, or
    nothing is asked; DataError for what is no question.
    """
    questions = check_questions(prompts, "prompts")
    questions += read_questions(file, config.data.max_line_bytes) if file is not None else []
    if not questions:
        raise ConfigError("nothing is asked. Give a PROMPT, or --file with questions.")
    answers = _Models(config, run, models, max_tokens)
    return GenerateResult(
        tuple(questions), {name: tuple(answers.of(name, asked) for asked in questions) for name in answers.names}
    )


def chat(
    config: RunConfig,
    run: RunPaths,
    lines: Iterable[str],
    tell: Callable[[Mapping[str, str]], None],
    models: Sequence[str] = (),
    max_tokens: int | None = None,
) -> None:
    """Answer each line, every model with its own turns before; /new begins anew. tell: hears each model's answer.

    As `generate`, but that by default the base, the parent and the candidate of the run answer, as far as there are
    any.
    """
    every = (BASE, *([PARENT] if config.model.adapter else []), *([CANDIDATE] if run.candidate.is_dir() else []))
    answers = _Models(config, run, models or every, max_tokens)
    turns: dict[str, list[Mapping[str, str]]] = {name: [] for name in answers.names}
    for line in map(str.strip, lines):
        if line == ANEW:
            turns = {name: [] for name in answers.names}
        elif line:
            said = {}
            for name, before in turns.items():
                before.append({"role": "user", "content": line})
                said[name] = answers.of(name, before)
                before.append({"role": "assistant", "content": said[name]})
            tell(said)


def side_by_side(said: Mapping[str, str]) -> list[str]:
    """What each of several models says, its name before it."""
    width = max(map(len, said))
    return [f"{name:{width}}  {text}" for name, text in said.items()]


class _Models:
    """The models that answer, by name."""

    def __init__(self, config: RunConfig, run: RunPaths, models: Sequence[str], max_tokens: int | None) -> None:
        chosen = models or [CANDIDATE if run.candidate.is_dir() else BASE]
        self._folders = {name: _folder(name, config, run) for name in chosen}
        self._backend = make_backend(config)
        base = resolve_base(config.model)
        self._tokenizer, self._positions = load_tokenizer(base.folder), base.positions
        self._max_tokens = max_tokens or config.evaluation.max_answer_tokens
        self.names = tuple(self._folders)
        self._shown: str | None = None

    def of(self, name: str, question: Question) -> str:
        """The answer of a model."""
        if name != self._shown:
            self._backend.show_adapter(self._folders[name])
            self._shown = name
        return answer(self._backend, self._tokenizer, question, self._max_tokens, self._positions)


def _turns_of(question: Question) -> list[str]:
    """What is asked, for a person: the prompt, or each turn with who speaks."""
    if isinstance(question, str):
        return [question]
    return [f"{turn['role']}: {turn['content']}" for turn in question]


def _folder(name: str, config: RunConfig, run: RunPaths) -> Path | None:
    """The adapter of a model; None for the base alone."""
    if name == BASE or (name == PARENT and config.model.adapter is None):
        return None
    if name == CANDIDATE:
        if not run.candidate.is_dir():
            raise ConfigError(f"{run.candidate} is not there: run {config.name} has no candidate. Run nestune train.")
        return run.candidate
    return resolve_adapter(config.model.adapter if name == PARENT and config.model.adapter else name, config.registry)
