"""What is random in training, as functions of the seed alone: the same on every backend, and nothing to save.

NumPy draws the first weights, so a new adapter has the same bits on PyTorch and MLX. What dropout leaves out at a step
is drawn by each framework's own generator, seeded anew for every step: a resumed run sees what an unbroken one sees.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestune.tiers.parameters import LoraParameter


def initial_weights(parameters: Sequence[LoraParameter], seed: int, upon: int = 0) -> dict[str, NDArray[Any]]:
    """A new adapter, float32 by canonical name: A uniform within +-1 / sqrt(inputs), B zero, so that B A = 0.

    Each A has a generator of its own, so that it does not depend on what else is trained. `upon`: the rank of the
    adapter that it comes on top of; one that began with the same seed is so not drawn again.
    Source: PEFT's default (kaiming_uniform with a = sqrt(5)) and mlx-lm's, which are the same law.
    """
    weights = {}
    for parameter in parameters:
        if parameter.side == "b":
            weights[parameter.name] = np.zeros(parameter.shape, np.float32)
            continue
        generator = np.random.default_rng([seed, *([upon] if upon else []), *parameter.name.encode()])
        bound = parameter.shape[1] ** -0.5
        weights[parameter.name] = generator.uniform(-bound, bound, parameter.shape).astype(np.float32)
    return weights


def step_seed(seed: int, step: int) -> int:
    """The seed, 0 to 2^63 - 1, of all that is drawn at a training step."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))
