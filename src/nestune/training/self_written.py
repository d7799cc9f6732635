"""Texts that the teacher writes before training, on which the model is held to it; written once, and kept.

What is kept is found by the hash of all that it depends on, below ~/.cache/nestune/texts, or NESTUNE_CACHE/texts.
Source: knowledge rehearsed on self-generated samples, Shin et al. 2017, arXiv:1705.08690; questions drawn from the
opening of a chat template, Xu et al. 2024 (Magpie), arXiv:2406.08464.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from nestune.backends.base import Backend
from nestune.backends.randomness import step_seed
from nestune.config import KlConfig
from nestune.data.openings import Openings
from nestune.errors import ConfigError, StorageError
from nestune.files import write_text
from nestune.foreign_files import parse_json, read_bounded
from nestune.stopping import StopRequests

FORMAT = 1
MAX_BYTES = 2**30
# Beside the texts to be held on, one for every ten of them that only measures.
TEXTS_A_MEASURING_ONE = 10
TOO_SHORT = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SelfWritten:
    """Token ids of texts: `held` join the training, `measuring` are kept out of it; sha256: of them all."""

    held: list[list[int]]
    measuring: list[list[int]]
    sha256: str


def self_written(
    backend: Backend,
    kl: KlConfig,
    openings: Openings,
    prompts: Sequence[Sequence[int]],
    made_from: dict[str, Any],
    end_id: int,
    batch_size: int,
    seed: int,
    stop: StopRequests | None = None,
) -> SelfWritten:
    """What the teacher, which the backend computes with now, writes from nothing and answers to prompts.

    made_from: what else the texts depend on, by name, as JSON has it: base, teacher, tokenizer. end_id: the token that
    ends a text that the teacher has ended. Raises ConfigError when there is nothing to write from, or nothing worth
    keeping is written; StoppedError between two batches.
    """
    depends_on = {
        "format": FORMAT,
        **made_from,
        "backend": backend.name,
        "seed": seed,
        "batch_size": batch_size,
        "self_written": kl.self_written.model_dump(mode="json"),
        "prompts": [list(map(int, prompt)) for prompt in prompts],
    }
    path = _cache() / f"{hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()}.json"
    texts = _kept(path)
    if texts is None:
        texts = list(_write(backend, kl, openings, prompts, end_id, batch_size, seed, stop))
        texts = [text for text in texts if len(text) >= TOO_SHORT]
        if not texts:
            raise ConfigError(
                "retention.kl: the teacher wrote nothing, only ends of texts. Try another "
                "retention.kl.self_written.opening, or give prompts in retention.kl.prompts."
            )
        _keep(path, texts)
    every = TEXTS_A_MEASURING_ONE + 1
    measuring = texts[::every] if len(texts) > 1 else []
    held = [text for number, text in enumerate(texts) if number % every or not measuring]
    return SelfWritten(held, measuring, _sha256(texts))


def _write(
    backend: Backend,
    kl: KlConfig,
    openings: Openings,
    prompts: Sequence[Sequence[int]],
    end_id: int,
    batch_size: int,
    seed: int,
    stop: StopRequests | None,
) -> Iterator[list[int]]:
    """Texts from nothing, the openings in turn, then the prompts with their answers."""
    settings = kl.self_written
    begun = openings.named(settings.opening)
    wanted = settings.texts + -(-settings.texts // TEXTS_A_MEASURING_ONE)
    if wanted and not begun:
        raise ConfigError(
            f"retention.kl.self_written.opening is {settings.opening}, and the base's tokenizer has no "
            f"{'chat template' if settings.opening == 'chat' else 'start token'} to write from. Name another, or set "
            "retention.kl.self_written.texts to 0 and give prompts in retention.kl.prompts."
        )
    starts = [list(begun[number % len(begun)]) for number in range(wanted)] + [list(prompt) for prompt in prompts]
    for number, at in enumerate(range(0, len(starts), batch_size)):
        if stop is not None:
            stop.check()
        texts = _continue(backend, starts[at : at + batch_size], settings, step_seed(seed, 2 * number))
        # A question that it made up, it answers, too; but not one that was cut, or its own answer to a prompt.
        asked = [
            place for place, (text, ended) in enumerate(texts) if ended and _is_open(text, openings, starts[at + place])
        ]
        if asked:
            questions = [[*texts[place][0], *openings.answer] for place in asked]
            answers = _continue(backend, questions, settings, step_seed(seed, 2 * number + 1))
            for place, answer in zip(asked, answers, strict=True):
                texts[place] = answer
        yield from ([*text, end_id] if ended else text for text, ended in texts)


def _is_open(text: Sequence[int], openings: Openings, start: Sequence[int]) -> bool:
    written_freely = tuple(start) in (openings.start, openings.user_turn)
    return written_freely and bool(openings.answer) and openings.is_question(text)


def _continue(backend: Backend, starts: Sequence[list[int]], settings: Any, seed: int) -> list[tuple[list[int], bool]]:
    """Each start with what follows it, and whether that was ended by an end token, which is left out."""
    written = backend.generate(starts, settings.max_tokens, settings.temperature, seed)
    return [
        ([*start, *tokens], len(tokens) < settings.max_tokens) for start, tokens in zip(starts, written, strict=True)
    ]


class _Kept(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)

    sha256: str
    texts: list[list[int]]


def _kept(path: Path) -> list[list[int]] | None:
    """The texts of an earlier time; None when there are none, or they are not as they were kept."""
    try:
        kept = _Kept.model_validate(parse_json(read_bounded(path, MAX_BYTES)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%.200s): the teacher writes its texts again", path, error)
        return None
    if kept.sha256 != _sha256(kept.texts):
        log.warning("%s has changed since it was written: the teacher writes its texts again", path)
        return None
    return kept.texts


def _keep(path: Path, texts: list[list[int]]) -> None:
    try:
        write_text(path, json.dumps({"sha256": _sha256(texts), "texts": texts}))
    except StorageError as error:
        log.warning("%s The teacher's texts are not kept for another time.", error)


def _sha256(texts: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _cache() -> Path:
    named = os.environ.get("NESTUNE_CACHE")
    return (Path(named) if named else Path.home() / ".cache" / "nestune") / "texts"
