"""A picture of measured importances: layers by modules, the brighter the more important."""

import io
from collections.abc import Sequence

from nestune.tiers.importance import Importance
from nestune.tiers.parameters import LoraParameter

MEASURES = {"gradient": "mean |g|", "squared_gradient": "mean g²", "taylor": "mean |w g|"}
LOG_SCALE_FROM = 10.0  # times that the largest value is the smallest
NO_GRADIENT = "#bbbbbb"
TITLE_WIDTH = 5.0  # inches that the longest title takes, and the labels beside it


def plot_importance(parameters: Sequence[LoraParameter], importance: Importance, measure: str) -> bytes:
    """PNG with a row for each layer (the shallowest at the bottom) and a column for each adapted module.

    A cell is the measure of A plus that of B, by which modules are ranked; grey where that is 0. The same measures
    give the same bytes.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    layers = sorted({p.layer for p in parameters})
    modules = list(dict.fromkeys(p.module for p in parameters))
    grid = np.zeros((len(layers), len(modules)))
    for p in parameters:
        grid[layers.index(p.layer), modules.index(p.module)] += importance[p.name]
    shown = np.ma.masked_equal(grid, 0)
    decades = shown.max() >= LOG_SCALE_FROM * shown.min()
    norm = LogNorm(shown.min(), shown.max()) if decades else Normalize(0, shown.max())

    width = max(TITLE_WIDTH, 2.6 + 0.8 * len(modules))
    figure = Figure(figsize=(width, 1.6 + 0.32 * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor(NO_GRADIENT)
    # viridis rises evenly in lightness, so that people who do not see all colours read it too, and a copy in grey.
    cells = axes.pcolormesh(shown, cmap=colormaps["viridis"], norm=norm, edgecolors="white", linewidth=2)
    axes.set_xticks([i + 0.5 for i in range(len(modules))], [m.rpartition(".")[2] for m in modules], rotation=30)
    axes.set_yticks([i + 0.5 for i in range(len(layers))], [str(layer) for layer in layers])
    axes.set_ylabel("layer")
    zeros = "; grey: 0" if np.ma.is_masked(shown) else ""
    axes.set_title(f"Importance of modules\n{MEASURES[measure]} of A + {MEASURES[measure]} of B{zeros}", loc="left")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(cells, ax=axes, fraction=0.05).outline.set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, metadata={"Software": None})
    return content.getvalue()
