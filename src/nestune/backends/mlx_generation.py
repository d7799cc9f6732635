"""What an MLX model writes, greedily or drawn, for several prompts at once where the model can."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.generate import BatchGenerator, GenerationBatch
from numpy.typing import NDArray

Sampler = Callable[[mx.array], mx.array]
# Of the range of the log-probabilities; rounding to bfloat16 stays below, a wrong mask does not.
TOLERANCE = 0.02


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    ends: Sequence[int],
    at_once: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """The next tokens of each prompt, up to `max_tokens`, cut before the first of `ends`.

    The likeliest at temperature 0, else drawn from softmax(logits / temperature) by the seed. at_once: prompts that
    are answered together; the shorter ones are padded.
    """
    written: list[list[int]] = [[] for _ in prompts]

    def write(prompt: int, response: GenerationBatch.Response) -> None:
        if response.finish_reason != "stop":
            written[prompt].append(response.token)

    _generate(model, prompts, max_tokens, ends, at_once, write, _drawing(temperature, seed) if temperature else None)
    return written


def _drawing(temperature: float, seed: int) -> Sampler:
    """Draws tokens (B,) from log-probabilities (B, V), by a key of its own at every call."""
    keys = _keys(seed)

    def draw(log_probabilities: mx.array) -> mx.array:
        return mx.random.categorical(log_probabilities * (1 / temperature), key=next(keys))

    return draw


def _keys(seed: int) -> Iterator[mx.array]:
    state = mx.random.key(seed)
    while True:
        state, key = mx.random.split(state)
        yield key


def answers_together(model: nn.Module) -> bool:
    """Whether a prompt gets the same answer beside a longer one as alone.

    Some of mlx-lm's models fail there, and some go wrong in silence: Gemma 2 takes the mask of a row for that of a
    group of heads, and dynamic RoPE knows one position for all rows.
    """
    prompts = [[1, 2], [1, 2, 3, 4]]
    try:
        together = _first_log_probabilities(model, prompts, at_once=2)
    except (TypeError, ValueError, RuntimeError):
        return False
    alone = _first_log_probabilities(model, prompts, at_once=1)
    return bool(np.abs(together - alone).max() <= TOLERANCE * np.ptp(alone))


def _first_log_probabilities(model: nn.Module, prompts: Sequence[Sequence[int]], at_once: int) -> NDArray[Any]:
    """Those of the first token after each prompt, float32 (prompts, vocabulary)."""
    seen: dict[int, mx.array] = {}
    _generate(model, prompts, 1, [], at_once, lambda prompt, response: seen.update({prompt: response.logprobs}))
    return np.array(mx.stack([seen[prompt] for prompt in range(len(prompts))]).astype(mx.float32))


def _generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    ends: Sequence[int],
    at_once: int,
    take: Callable[[int, GenerationBatch.Response], None],
    sampler: Sampler | None = None,
) -> None:
    """Hand each token over, with the number of its prompt; greedy ones without a sampler."""
    generator = BatchGenerator(
        model,
        max_tokens=max_tokens,
        stop_tokens=[[token] for token in ends],
        sampler=sampler,
        completion_batch_size=at_once,
        prefill_batch_size=at_once,
    )
    try:
        number_of = {uid: number for number, uid in enumerate(generator.insert([list(prompt) for prompt in prompts]))}
        while responses := generator.next_generated():
            for response in responses:
                take(number_of[response.uid], response)
    finally:
        generator.close()
