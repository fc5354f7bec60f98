"""A picture of a fit: recall and mass on held-out sequences over the steps, a line a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hashattn.core.extras import require
from hashattn.lab import report


def save_curves(records: Sequence[Mapping[str, Any]], path: Path, budget: float) -> bool:
    """Write the picture; False where matplotlib is missing or an encoder has no steps.

    Args:
        records: of the layers, as layer-NN.json holds them.
        path: of the file.
        budget: share of the keys, for the axes.
    """
    drawn = [r for r in records if r["looks"]]
    try:
        require("matplotlib.figure", "demo", "curves.png")
    except ImportError:
        return False
    if not drawn:
        return False
    figure = report.figure(10, 4)
    axes = figure.subplots(1, 2)
    colours = require("matplotlib", "demo", "curves.png").colormaps["viridis"]
    for axis, name in zip(axes, ("recall", "mass"), strict=True):
        for i, record in enumerate(drawn):
            steps, values = ([look[what] for look in record["looks"]] for what in ("step", name))
            colour = colours(i / max(1, len(drawn) - 1))
            axis.plot(steps, values, color=colour, label=f"layer {record['layer']}", linewidth=1)
        axis.set_xlabel("step")
        axis.set_title(f"{name} at {budget:.0%} of the keys, held out")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=6, ncols=3)
    report.save(figure, path, dpi=120)
    return True
