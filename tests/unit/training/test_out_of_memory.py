"""Whatever says that there is no memory left, the user reads what to do."""

from collections.abc import Callable

import numpy as np
import pytest

from nestune.errors import RunError
from nestune.training.out_of_memory import told_out_of_memory


def on_torch() -> None:
    torch = pytest.importorskip("torch")
    torch.empty(2**50)


def with_numpy() -> None:
    np.zeros(2**50)


@pytest.mark.parametrize("allocate", [on_torch, with_numpy])
def test_a_machine_without_memory_is_told_with_what_to_do(allocate: Callable[[], None]) -> None:
    with (
        pytest.raises(RunError, match=r"not enough memory: .+ training\.gradient_checkpointing=true"),
        told_out_of_memory(),
    ):
        allocate()


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes do not match"), told_out_of_memory():
        raise RuntimeError("shapes do not match")
