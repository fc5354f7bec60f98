"""Pictures of the keys that were read, in characters and as a PNG. In both, darker is more."""

from __future__ import annotations

import math
from pathlib import Path

from hashattn.core.extras import require
from hashattn.lab import report
from hashattn.lab.demo.reads import Reads

SHADES = " .:-=+*#%@"
LIGHTEST = 1 / 8  # times the layer's average key: what is read less is as light


def picture(reads: Reads, preset: str, *, width: int = 72) -> str:
    """A line a layer, the text from left to right; on the right, how the fact's keys were read against the others."""
    bins = reads.bins(width)
    top = reads.darkest(bins)
    lines = [
        f"Keys read by {preset} while answering: layers downwards, the text from left to right. Darker is more, up to",
        f"{top:.1f} times the layer's average key; keys kept for their position, sinks and recent ones, set no scale.",
    ]
    if reads.fact is not None:
        lines.append("On the right: the fact's keys, times the average of the others.")
    for layer, row in enumerate(bins):
        lines.append(f"{layer:>4} |" + "".join(_shade(value, top) for value in row) + "|" + _times(reads, layer))
    if reads.fact is not None:
        first, last = (position * width // reads.tokens for position in (reads.fact[0], reads.fact[1] - 1))
        lines.append("      " + " " * first + "^" * (last - first + 1) + " the fact")
    return "\n".join(lines)


def verdict(reads: Reads) -> str | None:
    """How often the fact's keys were read, against the average of the others; None if that is not known."""
    found = reads.over_others_searching
    if found is None or reads.fact is None:
        return None
    keys = reads.fact[1] - reads.fact[0]
    against = "as often as the average of the others, in the layers that searched"
    return f"The fact's {keys} keys were read {found:.1f} times {against}."


def save_plot(reads: Reads, preset: str, path: str | Path) -> None:
    """The same as a PNG; the fact is marked above the picture, and its keys have a panel beside it.

    Raises:
        ImportError: matplotlib is missing.
    """
    colors = require("matplotlib.colors", "demo", "--plot")
    bins = reads.bins(min(400, reads.tokens))
    figure = report.figure(12, 1.4 + 0.16 * len(bins))
    known = any(value is not None for value in reads.over_others)
    axes, *beside = figure.subplots(1, 1 + known, width_ratios=[5, 1][: 1 + known], sharey=True, squeeze=False)[0]
    shades = {"norm": colors.LogNorm(LIGHTEST, reads.darkest(bins), clip=True), "cmap": "Greys"}
    place = {"aspect": "auto", "extent": (0, reads.tokens, len(bins) - 0.5, -0.5), "interpolation": "nearest"}
    image = axes.imshow([[max(value, LIGHTEST) for value in row] for row in bins], **place, **shades)
    if reads.fact is not None:
        above = {"xy": (sum(reads.fact) / 2, 1), "xycoords": ("data", "axes fraction")}
        arrow = {"arrowstyle": "-|>", "color": "black"}
        away = {"xytext": (0, 22), "textcoords": "offset points", "ha": "center", "annotation_clip": False}
        axes.annotate("the fact", arrowprops=arrow, **above, **away)
    figure.suptitle(f"Keys read by {preset} while answering", fontsize=10)
    axes.set_xlabel("position in the text (tokens)")
    axes.set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="times the layer's average key", location="left", pad=0.01)
    for panel in beside:
        panel.barh(range(len(bins)), [value or 0 for value in reads.over_others], color="black")
        panel.axvline(1, color="grey", lw=1)
        panel.set_xlabel("the fact's keys, times\nthe average of the others")
    report.save(figure, path)


def _shade(value: float, top: float) -> str:
    place = math.log(max(value, LIGHTEST) / LIGHTEST) / math.log(top / LIGHTEST)
    return SHADES[round(min(1.0, place) * (len(SHADES) - 1))]


def _times(reads: Reads, layer: int) -> str:
    value = reads.over_others[layer]
    return "" if value is None else f" {value:.1f}"
