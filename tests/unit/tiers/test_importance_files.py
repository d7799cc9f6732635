"""Measured importances: what is refused, how they are kept, and their picture."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.image import imread

from nestune.errors import ConfigError, RunError
from nestune.tiers.importance import Measured, check_importance, read_importance, write_importance
from nestune.tiers.importance_picture import NO_GRADIENT, plot_importance
from nestune.tiers.parameters import LoraParameter

PARAMETERS = [LoraParameter(layer, "self_attn.q_proj", side, (8, 8)) for layer in range(3) for side in "ab"]


def importance(*of_layers: float) -> dict[str, float]:
    """The values of the layers: the first is all of A, the second half of A and half of B, the third all of B."""
    of_a = (1, 0.5, 0)
    return {p.name: of_layers[p.layer] * (of_a[p.layer] if p.side == "a" else 1 - of_a[p.layer]) for p in PARAMETERS}


def colors_of_cells(png: bytes) -> list[tuple[float, ...]]:
    """The colour in the middle of each layer's cell, the shallowest layer first."""
    pixels = imread(io.BytesIO(png))[:, :, :3]
    column = pixels[:, pixels.shape[1] // 2]
    column = column[:-1][(column[1:] == column[:-1]).all(axis=1)]  # without text, whose edges have shades of grey
    colored = [
        tuple(color) for color in column if np.ptp(color) > 0.05 or math.isclose(color[0], 0xBB / 255, abs_tol=0.01)
    ]
    runs = [color for i, color in enumerate(colored) if i == 0 or not np.allclose(color, colored[i - 1], atol=0.02)]
    return runs[::-1]


def test_the_colour_of_a_cell_is_the_logarithm_of_a_plus_b_where_values_span_a_decade() -> None:
    seen = colors_of_cells(plot_importance(PARAMETERS, importance(0.01, 0.1, 1.0), "gradient"))
    assert np.allclose(seen, [colormaps["viridis"](place)[:3] for place in (0.0, 0.5, 1.0)], atol=0.02)


def test_the_colour_is_proportional_to_a_plus_b_where_values_are_close() -> None:
    seen = colors_of_cells(plot_importance(PARAMETERS, importance(2, 3, 4), "taylor"))
    assert np.allclose(seen, [colormaps["viridis"](place)[:3] for place in (0.5, 0.75, 1.0)], atol=0.02)


def test_a_cell_without_any_gradient_is_grey() -> None:
    seen = colors_of_cells(plot_importance(PARAMETERS, importance(1, 0, 2), "squared_gradient"))
    grey = tuple(int(NO_GRADIENT[i : i + 2], 16) / 255 for i in (1, 3, 5))
    assert np.allclose(seen[1], grey, atol=0.01)


def test_a_picture_of_one_module_cuts_nothing_off() -> None:
    pixels = imread(io.BytesIO(plot_importance(PARAMETERS, importance(0.02, 0, 0.03), "taylor")))[:, :, :3]
    assert (pixels[:, [0, -1]] == 1).all()


def test_the_same_importances_give_the_same_picture() -> None:
    first, second = (plot_importance(PARAMETERS, importance(1, 5, 30), "gradient") for _ in range(2))
    assert first == second
    assert first != plot_importance(PARAMETERS, importance(1, 5, 31), "gradient")


def test_importances_that_are_not_finite_are_refused_with_the_first_matrix() -> None:
    with pytest.raises(ConfigError, match=r"gradient of layers\.1\.self_attn\.q_proj\.lora_a is inf, and 2 of 6 are"):
        check_importance(importance(1, math.inf, 2), "gradient")


def test_importances_that_are_all_zero_are_refused_and_a_single_other_one_is_enough() -> None:
    with pytest.raises(ConfigError, match="taylor of every matrix is 0"):
        check_importance(importance(0, 0, 0), "taylor")
    check_importance(importance(0, 1e-30, 0), "taylor")


def test_a_pass_read_back_is_the_pass_written_with_the_cost_of_a_step(tmp_path: Path) -> None:
    measured = Measured(importance(0.1, 1 / 3, 7e-9), {"measure": "gradient", "steps": 4, "parent_sha256": None}, 2.5)
    write_importance(measured, tmp_path / "importance.json")
    assert read_importance(tmp_path / "importance.json") == measured
    assert measured.cost == {"steps": 4, "seconds": 2.5, "seconds_per_step": 0.625}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "is not JSON"),
        ('{"importance": {}, "sha256": ""}', "lacks measured_on, seconds"),
        ('{"measured_on": {}, "seconds": 1, "importance": {}}', "lacks sha256"),
    ],
)
def test_a_file_that_holds_no_pass_is_refused_with_the_remedy(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "importance.json").write_text(content)
    with pytest.raises(RunError, match=rf"{expected}.*Delete it, and run nestune tiers again"):
        read_importance(tmp_path / "importance.json")


def without_one(values: dict[str, float]) -> dict[str, float]:
    return dict(list(values.items())[1:])


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: kept | {"importance": without_one(kept["importance"])},
        lambda kept: kept | {"importance": kept["importance"] | {"layers.9.self_attn.q_proj.lora_a": 1.0}},
        lambda kept: kept | {"importance": {name: -value for name, value in kept["importance"].items()}},
        lambda kept: kept | {"importance": dict.fromkeys(kept["importance"], math.nan)},
        lambda kept: kept | {"importance": dict.fromkeys(kept["importance"], 0.0)},
        lambda kept: kept | {"importance": "much"},
        lambda kept: kept | {"measured_on": kept["measured_on"] | {"steps": 100}},
        lambda kept: kept | {"seconds": -1},
        lambda kept: kept | {"seconds_per_step": 0.1},
    ],
    ids=["a name less", "a name more", "negated", "NaN", "all 0", "text", "measured on", "seconds", "a step's seconds"],
)
def test_a_file_changed_by_hand_is_refused_with_the_remedy(
    tmp_path: Path, damage: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    path = tmp_path / "importance.json"
    write_importance(Measured(importance(1, 2, 3), {"measure": "gradient", "steps": 4}, 2.5), path)
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(RunError, match=r"changed by hand\. Delete it, and run nestune tiers again"):
        read_importance(path)
