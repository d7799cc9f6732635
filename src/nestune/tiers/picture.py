"""A picture of a tier map: layers by modules, one colour a tier."""

import io
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from nestune.tiers.parameters import LoraParameter, split_name
from nestune.tiers.schedule import describe_period
from nestune.tiers.tier_map import TierMap

# Told apart by people who do not see all colours (Okabe & Ito 2008); as many as there can be tiers.
TIER_COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#333333")
TITLE_WIDTH = 4.8  # inches that the longest title takes, and the labels beside it
LEGEND_WIDTH = 2.4  # inches that a tier of a period of four digits takes


def plot_tier_map(parameters: Sequence[LoraParameter], tier_map: TierMap) -> bytes:
    """PNG with a row for each layer (the shallowest at the bottom) and a column for each adapted module.

    A cell is split where A (left) and B (right) are on different tiers, and into its ranks, the first at the bottom,
    where these are. The same map gives the same bytes.
    """
    import numpy as np
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    layers, modules = _layers_and_modules(parameters)
    grid = tier_grid(parameters, tier_map)
    height = len(grid) // len(layers)
    n_tiers = len(tier_map.update_every)
    layer_height = 0.32 if height == 1 else max(0.32, 0.12 * n_tiers)
    width = max(TITLE_WIDTH, 1.8 + 0.8 * len(modules))
    columns = min(n_tiers, 3, int(width / LEGEND_WIDTH))
    figure = Figure(figsize=(width, 1.8 + layer_height * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    colors = ListedColormap(TIER_COLORS[:n_tiers])
    axes.pcolormesh(grid, cmap=colors, vmin=-0.5, vmax=n_tiers - 0.5)
    axes.vlines(range(0, 2 * len(modules) + 1, 2), 0, len(grid), colors="white", linewidth=2)
    axes.hlines(range(0, len(grid) + 1, height), 0, 2 * len(modules), colors="white", linewidth=2)
    axes.set_xticks([2 * i + 1 for i in range(len(modules))], [m.rpartition(".")[2] for m in modules], rotation=30)
    axes.set_yticks([(i + 0.5) * height for i in range(len(layers))], [str(layer) for layer in layers])
    axes.set_ylabel("layer")
    sides_differ = not np.array_equal(grid[:, ::2], grid[:, 1::2], equal_nan=True)
    notes = ["left A, right B"] * sides_differ + ["ranks from bottom to top"] * (height > 1)
    axes.set_xlabel("; ".join(notes))
    axes.set_title(f"Tiers by {tier_map.strategy}", loc="left")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    legend = [
        Patch(color=TIER_COLORS[tier], label=f"tier {tier}: {describe_period(period)}")
        for tier, period in enumerate(tier_map.update_every)
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=columns, frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, metadata={"Software": None})
    return content.getvalue()


def tier_grid(parameters: Sequence[LoraParameter], tier_map: TierMap) -> NDArray[Any]:
    """Tiers as the picture shows them, NaN where a layer lacks a module: (layers x height, 2 x modules) float.

    A layer is 1 high, or as high as matrices have ranks where any is divided; a module has a column for A and for B.
    """
    import numpy as np

    layers, modules = _layers_and_modules(parameters)
    described = {p.name: p for p in parameters}
    divided = any(split_name(name)[1] is not None for name in tier_map.tier_of)
    height = max(p.rank for p in parameters) if divided else 1
    grid = np.full((len(layers) * height, 2 * len(modules)), np.nan)
    for name, tier in tier_map.tier_of.items():
        matrix, ranks = split_name(name)
        p = described[matrix]
        ranks = range(p.rank) if ranks is None else ranks
        bottom = layers.index(p.layer) * height
        rows = slice(bottom + ranks.start * height // p.rank, bottom + ranks.stop * height // p.rank)
        grid[rows, 2 * modules.index(p.module) + (p.side == "b")] = tier
    return grid


def _layers_and_modules(parameters: Sequence[LoraParameter]) -> tuple[list[int], list[str]]:
    return sorted({p.layer for p in parameters}), list(dict.fromkeys(p.module for p in parameters))
