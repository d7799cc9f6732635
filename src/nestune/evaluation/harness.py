"""Tasks of EleutherAI's lm-evaluation-harness, asked of a backend's model.

The harness (github.com/EleutherAI/lm-evaluation-harness) builds the questions and judges the answers; a backend gives
log-likelihoods and greedy text. What comes back is a score like any other, called lm_eval/<task>: by the task's first
metric, with what each document scored.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from nestune.backends.base import Backend
from nestune.config import EvaluationConfig, LmEvalConfig
from nestune.data.tokens import Tokenizer
from nestune.errors import ConfigError
from nestune.evaluation.scores import Outcomes, Score
from nestune.stopping import StopRequests

PREFIX = "lm_eval/"
TOLERANCE = 1e-6  # between a metric and the mean of its documents

MOST_ANSWER_TOKENS = 256  # the harness's own default

log = logging.getLogger(__name__)


def check_installed() -> None:
    """Raise ConfigError when the harness is not installed."""
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "evaluation.lm_eval needs the package lm-eval, which is not installed; install it with: "
            "pip install 'nestune[lm-eval]'"
        )


def score_tasks(
    backend: Backend,
    tokenizer: Tokenizer,
    evaluation: EvaluationConfig,
    positions: int,
    stop: StopRequests | None = None,
) -> dict[str, Score]:
    """The score of the model that the backend has now on every task, by `lm_eval/<task>`; groups are taken apart.

    positions: tokens of the longest row; of more only the last are seen, with a warning. Raises ConfigError when the
    harness is not installed, a task is not known or has no metric of which more is better; StoppedError between
    two requests.
    """
    wanted = evaluation.lm_eval
    if wanted is None:
        return {}
    check_installed()
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import evaluate

    class BackendModel(_Answers, TemplateLM):  # type: ignore[misc]
        """Made here, as its parent is of an optional package."""

    found = evaluate(
        lm=BackendModel(backend, tokenizer, evaluation.batch_size, positions, stop),
        task_dict=_load(wanted),
        limit=wanted.limit,
        bootstrap_iters=0,
        apply_chat_template=wanted.chat_template,
        fewshot_as_multiturn=wanted.chat_template,
    )
    assert found is not None, "only other processes of several get nothing"
    higher = found["higher_is_better"]
    return {
        f"{PREFIX}{task}": _score(task, found["results"][task], samples, higher.get(task, {}))
        for task, samples in found["samples"].items()
    }


def _load(wanted: LmEvalConfig) -> Any:
    """The tasks as the harness has them; its own, thousands of files, are read only where the folder lacks one."""
    manager = _manager(wanted.path, with_its_own=wanted.path is None)
    if not set(wanted.tasks) <= set(manager.all_tasks):
        manager = _manager(wanted.path, with_its_own=True)
    unknown = [task for task in wanted.tasks if task not in manager.all_tasks]
    if unknown:
        there = f", nor in {wanted.path}" if wanted.path else "; evaluation.lm_eval.path may name a folder with others"
        raise ConfigError(
            f"evaluation.lm_eval.tasks: there is no {', '.join(unknown)} in lm-evaluation-harness{there}. "
            "`lm_eval ls tasks` lists its own."
        )
    loaded = manager.load(list(wanted.tasks))
    for task in loaded["tasks"].values():
        if wanted.fewshot is not None:
            task.set_config(key="num_fewshot", value=wanted.fewshot)
        task.set_fewshot_seed(seed=0)
    return loaded


@cache
def _manager(path: str | None, with_its_own: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=path, include_defaults=with_its_own)


def _score(
    task: str, results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], higher_is_better: Mapping[str, Any]
) -> Score:
    """A task's score by its first metric of which more is better."""
    metrics = [key for key in results if "," in key and "_stderr," not in key]
    better = [key for key in metrics if higher_is_better.get(key.partition(",")[0]) and _is_number(results[key])]
    if not better:
        raise ConfigError(
            f"evaluation.lm_eval.tasks: {task} is judged by {', '.join(metrics) or 'nothing'}, of which more is not "
            "better. Take a task with a metric such as acc or exact_match."
        )
    metric, _, filtered = better[0].partition(",")
    value = float(results[better[0]])
    of_documents = sorted((s for s in samples if s.get("filter") == filtered), key=lambda sample: sample["doc_id"])
    amounts = tuple(float(sample[metric]) for sample in of_documents if _is_number(sample.get(metric)))
    # Some metrics are more than the mean of what documents score, such as a corpus's F1.
    is_mean = len(amounts) == len(of_documents) > 0 and abs(sum(amounts) / len(amounts) - value) <= TOLERANCE
    outcomes = Outcomes(amounts, (1,) * len(amounts)) if is_mean else None
    return Score(None, 0, value, len(of_documents), outcomes=outcomes, metric=metric)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.number)) and math.isfinite(value)


class _Answers:
    """What the harness asks of a model, by a backend: likelihoods row by row, which needs no padding, texts in batches.

    The methods and their arguments are those of `lm_eval.api.model.TemplateLM`, the rest of which it is mixed with.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        batch_size: int,
        positions: int,
        stop: StopRequests | None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = positions
        self._backend, self._batch_size, self._stop = backend, batch_size, stop

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        start = self.tokenizer.bos_token
        begins = start is not None and string.startswith(start)
        special = not begins if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer(string, add_special_tokens=special)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **how))

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        return [self._likelihood(context, text) for _, context, text in self._checked(requests)]

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        totals = []
        for request in self._checked(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            totals.append(sum(self._likelihood(*make_disjoint_window(window))[0] for window in windows))
        return totals

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        asked = [request.args for request in requests]
        return [
            answer
            for start in self._checked(range(0, len(asked), self._batch_size))
            for answer in self._texts(asked[start : start + self._batch_size])
        ]

    def _texts(self, asked: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        most = [int(arguments.get("max_gen_toks", MOST_ANSWER_TOKENS)) for _, arguments in asked]
        room = self.max_length - max(most)
        if room < 1 or any(arguments.get("do_sample") for _, arguments in asked):
            raise ConfigError(
                f"evaluation.lm_eval.tasks: a task asks for sampled text, or for {max(most)} tokens of a base that has "
                f"{self.max_length} positions. Take one with greedy, shorter answers (do_sample, max_gen_toks)."
            )
        prompts = [_last(self.tok_encode(prompt), room) for prompt, _ in asked]
        answers = self._backend.generate(prompts, max(most))
        texts = [
            self.tokenizer.decode(tokens[:count], skip_special_tokens=True)
            for tokens, count in zip(answers, most, strict=True)
        ]
        return [_until(text, arguments) for text, (_, arguments) in zip(texts, asked, strict=True)]

    def _likelihood(self, context: Sequence[int], text: Sequence[int]) -> tuple[float, bool]:
        """The log-probability, in nats, of a text after its context, and whether greedy generation would write it."""
        tokens = _last([*context, *text], self.max_length + 1)
        seen = np.array(tokens[-len(text) :])
        logits = self._backend.logits(tokens[:-1])[-len(seen) :].astype(np.float64)
        highest = logits.max(axis=-1)
        totals = np.log(np.exp(logits - highest[:, None]).sum(axis=-1)) + highest
        chosen = logits[np.arange(len(seen)), seen]
        return float((chosen - totals).sum()), bool((logits.argmax(axis=-1) == seen).all())

    def _checked(self, items: Sequence[Any]) -> Iterable[Any]:
        return self._stop.watched(items) if self._stop else items


def _last(tokens: list[int], room: int) -> list[int]:
    if len(tokens) > room:
        log.warning("a request of lm-evaluation-harness has %d tokens; only its last %d are seen", len(tokens), room)
    return tokens[-room:]


def _until(answer: str, arguments: Mapping[str, Any]) -> str:
    """An answer up to the first of the texts that end it."""
    ends = arguments.get("until") or []
    for end in [ends] if isinstance(ends, str) else ends:
        answer = answer.split(end)[0] if end else answer
    return answer
