"""A picture of a tier map: layers by modules, one colour a tier."""

import io
from collections.abc import Sequence

from nestune.tiers.parameters import LoraParameter
from nestune.tiers.tier_map import TierMap

# Told apart by people who do not see all colours (Okabe & Ito 2008); as many as there can be tiers.
TIER_COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#333333")


def plot_tier_map(parameters: Sequence[LoraParameter], tier_map: TierMap) -> bytes:
    """PNG with a row for each layer (the shallowest at the bottom) and a column for each adapted module.

    A cell is split where A and B are on different tiers. The same map gives the same bytes.
    """
    import numpy as np
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    layers = sorted({p.layer for p in parameters})
    modules = list(dict.fromkeys(p.module for p in parameters))
    grid = np.full((len(layers), 2 * len(modules)), np.nan)
    for p in parameters:
        grid[layers.index(p.layer), 2 * modules.index(p.module) + (p.side == "b")] = tier_map.tier_of[p.name]

    n_tiers = len(tier_map.update_every)
    figure = Figure(figsize=(1.8 + 0.8 * len(modules), 1.8 + 0.32 * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    colors = ListedColormap(TIER_COLORS[:n_tiers])
    axes.pcolormesh(grid, cmap=colors, vmin=-0.5, vmax=n_tiers - 0.5)
    axes.vlines(range(0, 2 * len(modules) + 1, 2), 0, len(layers), colors="white", linewidth=2)
    axes.hlines(range(len(layers) + 1), 0, 2 * len(modules), colors="white", linewidth=2)
    axes.set_xticks([2 * i + 1 for i in range(len(modules))], [m.rpartition(".")[2] for m in modules], rotation=30)
    axes.set_yticks([i + 0.5 for i in range(len(layers))], [str(layer) for layer in layers])
    axes.set_ylabel("layer")
    axes.set_title(f"Tiers by {tier_map.strategy}", loc="left")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    legend = [
        Patch(color=TIER_COLORS[tier], label=f"tier {tier}: every {_steps(period)}")
        for tier, period in enumerate(tier_map.update_every)
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=min(n_tiers, 3), frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, metadata={"Software": None})
    return content.getvalue()


def _steps(period: int) -> str:
    return "step" if period == 1 else f"{period} steps"
