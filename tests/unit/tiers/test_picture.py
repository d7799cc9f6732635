"""The picture of a tier map."""

import io

import numpy as np
import pytest
from lora_matrices import MODULES, parameters

from nestune.config import TierConfig
from nestune.tiers.picture import TIER_COLORS, plot_tier_map, tier_grid
from nestune.tiers.tier_map import assign_tiers

MANUAL = {"layers.0.*.lora_a": 2, "layers.0.*.q_proj.*": 1, "*": 0}


def test_layers_are_rows_and_a_and_b_of_each_module_are_columns() -> None:
    tier_map = assign_tiers(parameters(2), TierConfig(strategy="manual", assignments=MANUAL))
    assert tier_grid(parameters(2), tier_map).tolist() == [[2, 1, 2, 0], [0, 0, 0, 0]]


def test_a_divided_layer_is_as_high_as_its_matrices_have_ranks() -> None:
    tier_map = assign_tiers(parameters(2), TierConfig(strategy="stacked"))
    column = [0] * 3 + [1] * 3 + [2] * 2
    assert tier_grid(parameters(2), tier_map).T.tolist() == [column + column] * 4


def test_a_matrix_of_lower_rank_fills_the_height_of_its_layer() -> None:
    described = parameters(1, MODULES[:1], rank=8) + parameters(1, MODULES[1:], rank=4)
    tier_map = assign_tiers(described, TierConfig(strategy="stacked", update_every=(1, 2)))
    assert tier_grid(described, tier_map).T.tolist() == [[0] * 4 + [1] * 4] * 4


def test_a_module_that_a_layer_lacks_stays_empty() -> None:
    described = parameters([0]) + parameters([1], MODULES[:1])
    grid = tier_grid(described, assign_tiers(described, TierConfig(update_every=(1,))))
    assert np.isnan(grid).tolist() == [[False] * 4, [False, False, True, True]]


@pytest.mark.parametrize("modules", [MODULES[:1], MODULES])
def test_a_picture_of_few_modules_cuts_nothing_off(modules: tuple[str, ...]) -> None:
    from matplotlib.image import imread

    described = parameters(8, modules)
    periods = (1, 10, 100, *[1000] * 5)
    tier_map = assign_tiers(described, TierConfig(strategy="layer_depth_reversed", update_every=periods))
    pixels = imread(io.BytesIO(plot_tier_map(described, tier_map)))[..., :3]
    assert (pixels[:, [0, -1]] == 1).all()


@pytest.mark.parametrize("strategy", ["layer_depth", "stacked", "frozen_slow", "module_type"])
def test_every_tier_is_seen_in_its_colour(strategy: str) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    described = parameters(6, ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"))
    tier_map = assign_tiers(described, TierConfig(strategy=strategy))  # type: ignore[arg-type]
    png = plot_tier_map(described, tier_map)
    assert png == plot_tier_map(described, tier_map)
    pixels = imread(io.BytesIO(png))[..., :3].reshape(-1, 3)
    shares = [np.isclose(pixels, to_rgb(color), atol=1 / 255).all(axis=1).mean() for color in TIER_COLORS]
    # Text has shades of grey, one of them close to a colour.
    assert [share > 0.02 for share in shares] == [True] * 3 + [False] * 5
