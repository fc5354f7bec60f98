"""assemble(): all fitted layers together, for from_pretrained(), with a log and a picture."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hashattn.core.errors import refusals
from hashattn.core.json_files import write_json
from hashattn.encoders import PerLayer
from hashattn.fitted.calibration import Calibration
from hashattn.fitted.saving import save_pretrained
from hashattn.lab.learning.fit_folder import FitFolder
from hashattn.lab.learning.recipe import Recipe
from hashattn.lab.learning.shards import Shards

if TYPE_CHECKING:
    from hashattn.encoders import Encoder


def assemble(
    folder: FitFolder,
    shards: Shards,
    recipe: Recipe,
    layers: Sequence[int],
    kept: Collection[str],
    *,
    calibrate: bool,
    device: torch.device | str,
    progress: bool,
) -> Path:
    """Write folder/pretrained, log.json and, where matplotlib is installed, curves.png. Returns the first.

    Args:
        layers: all of them fitted.
        kept: names of the sequences that were held out.
        calibrate: also fit discounts and estimates.
        device: where to do so.
        progress: show a bar while doing so.
    """
    from hashattn.lab.learning.calibrate import calibrated
    from hashattn.lab.learning.curves import save_curves

    made: dict[int, nn.Module] = {i: _module(folder.encoder(i, shards.facts)) for i in layers}
    encoder = PerLayer(made, shards.facts)
    records = [folder.record(i) or {} for i in layers]
    reached = {str(r["layer"]): {n: r[n] for n in ("recall", "mass", "best_step")} for r in records}
    fitted_on: dict[str, Any] = {
        "recipe": recipe.as_json(),
        "sequences": [{**s, "source": PurePath(s["source"]).name} for s in shards.manifest.as_json()["sequences"]],
        "held_out": {"sequences": sorted(kept), "budget": recipe.budget, "layers": reached},
    }
    calibration = Calibration()
    if calibrate:
        calibration, found = calibrated(encoder, shards, kept, recipe, device=device, progress=progress)
        fitted_on["calibration"] = found
    with refusals(ValueError):  # something else is in that folder
        save_pretrained(encoder, folder.pretrained, calibration=calibration, fitted_on=fitted_on)
    write_json(folder.path / "log.json", {"recipe": recipe.as_json(), "layers": records})
    save_curves(records, folder.path / "curves.png", recipe.budget)
    return folder.pretrained


def _module(encoder: Encoder) -> nn.Module:
    assert isinstance(encoder, nn.Module)
    return encoder
