"""`hashattn fit`: its arguments, and what it says."""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch

from hashattn.core.errors import refusals
from hashattn.lab.commands import Help, add_device, check_folder, device_of
from hashattn.lab.learning.fit_folder import FitFolder, read_asked
from hashattn.lab.learning.recipe import ENCODERS, HEADS, Recipe
from hashattn.presets.written import parse

_NUMBERS = {  # name -> type, metavar, meaning
    "bits": (int, "N", "length of a code, 8 to 1024"),
    "bias_bits": (int, "N", "of these, for a scalar of each key (asymmetric, query-bits 1)"),
    "query_bits": (int, "N", "bit planes of a query: 1, 2, 4 or 8"),
    "steps": (int, "N", "of Adam a layer, at most"),
    "queries": (int, "N", "queries drawn at each step"),
    "lr": (float, "X", "peak learning rate"),
    "temperature": (float, "X", "of the teacher's softmax (kl)"),
    "seed": (int, "N", "of weights and draws"),
    "every": (int, "N", "steps between two looks at the held-out sequences"),
    "patience": (int, "N", "looks without a better recall after which a layer stops; 0 for never"),
    "held_out": (float, "X", "share of the sequences of each kind, the last ones, that are never fitted to"),
    "budget": (float, "X", "share of the keys that recall and mass are taken at"),
}


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command to argparse's subparsers."""
    default = Recipe()
    fit: argparse.ArgumentParser = commands.add_parser(
        "fit", help="fit encoders to captured queries and keys",
        description="Fits an encoder to each layer that hashattn capture wrote to SHARDS, and saves them together in "
        "DIR/pretrained, for from_preset(..., pretrained=...). The same command resumes what was stopped. Under "
        "torchrun each process takes its share of the layers.",
        formatter_class=Help,
    )  # fmt: skip
    fit.add_argument("shards", metavar="SHARDS", help="folder that hashattn capture filled")
    fit.add_argument("--out", metavar="DIR", required=True, help="new or empty folder, or one to resume")
    fit.add_argument(
        "--preset", metavar="NAME[:OPTION=X,...]",
        help="fit the encoder of this preset, such as pqcache:subquantisers=16; its shape is then the preset's",
    )  # fmt: skip
    fit.add_argument("--encoder", choices=ENCODERS, default=default.encoder, help="itq takes bits and query-bits only")
    fit.add_argument(
        "--query-hidden", nargs="+", metavar="N|none",
        help="widths of the query MLP, none for a linear query; 256 256 if left out",
    )  # fmt: skip
    fit.add_argument("--heads", choices=HEADS, default=default.heads, help="one set of weights a layer, or a KV head")
    fit.add_argument("--loss", default=default.loss, metavar="TERMS", help='such as "kl + 0.1 * balance"')
    for name, (kind, metavar, meaning) in _NUMBERS.items():
        fit.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=getattr(default, name), metavar=metavar, help=meaning
        )
    fit.add_argument("--layers", type=int, nargs="+", metavar="I", help="layers; all captured ones if left out")
    add_device(fit)
    fit.add_argument(
        "--calibrate", action="store_true",
        help="also fit the discounts of consensus and momentum, and the estimates of medium keys' logits",
    )  # fmt: skip
    fit.set_defaults(run=run, stopped=stopped)
    return fit


def run(arguments: argparse.Namespace) -> int:
    """Check the arguments, fit, print a table; returns the exit status."""
    with refusals():
        recipe = recipe_of(arguments)
        rank, world, local = (_environment(*named) for named in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        check_folder("out", arguments.out)
        device = device_of(arguments.device)
        if device.type == "cuda" and device.index is None and world > 1:
            device = torch.device("cuda", local % torch.cuda.device_count())

        from hashattn.lab.learning.fit import fit_layers
        from hashattn.lab.learning.shards import Shards

        shards = Shards.open(arguments.shards)
    saved = fit_layers(
        shards, arguments.out, recipe, layers=arguments.layers, device=device, calibrate=arguments.calibrate,
        rank=rank, world=world, progress=not arguments.quiet,
    )  # fmt: skip
    if saved is None:
        print(f"process {rank} of {world} is done; other layers are not yet: whoever finishes last saves them together")
        return 0
    folder = FitFolder(arguments.out)
    numbers = sorted(int(path.stem[6:]) for path in folder.path.glob("layer-*.json") if path.stem[6:].isdigit())
    print(table([record for i in numbers if (record := folder.record(i))]))
    print(f"\nrecall and mass (relative to exact top-k's) at {recipe.budget:.0%} of the keys, held-out sequences")
    name, options = ("...", {}) if recipe.preset is None else parse(recipe.preset)
    given = "".join(f", {option}={value!r}" for option, value in options.items())
    print(f'saved: HashAttention.from_preset("{name}"{given}, pretrained="{saved}")')
    return 0


def stopped(arguments: argparse.Namespace) -> str:
    """What a stopped fit leaves, and how to go on."""
    folder = FitFolder(arguments.out)
    asked = read_asked(folder)
    if asked is None:
        return "nothing was written yet; the same command begins anew"
    whole = sum(folder.record(layer) is not None for layer in asked["layers"])
    return (
        f"{whole} of {len(asked['layers'])} layers are fitted in {arguments.out} and are kept; the same command goes "
        "on with the others"
    )


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe that the arguments ask for; ValueError or TypeError if there can be none."""
    return Recipe(
        preset=arguments.preset, encoder=arguments.encoder, query_hidden=_widths(arguments.query_hidden),
        heads=arguments.heads, loss=arguments.loss, **{name: getattr(arguments, name) for name in _NUMBERS},
    )  # fmt: skip


def table(records: list[dict[str, Any]]) -> str:
    """A line a layer, and the mean."""
    rows = [("layer", "best step", "recall", "mass", "seconds")]
    rows += [
        (str(r["layer"]), f"{r['best_step']:,}", f"{r['recall']:.3f}", f"{r['mass']:.3f}", f"{r['seconds']:.0f}")
        for r in records
    ]
    recall, mass = (sum(r[name] for r in records) / len(records) for name in ("recall", "mass"))
    rows.append(("mean", "", f"{recall:.3f}", f"{mass:.3f}", f"{sum(r['seconds'] for r in records):.0f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def _widths(words: list[str] | None) -> tuple[int, ...] | None:
    if words is None:
        return None
    if words == ["none"]:
        return ()
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise ValueError(f"--query-hidden takes widths such as 256 256, or none, got {' '.join(words)}")
    return tuple(map(int, words))


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise ValueError(f"the environment variable {name} must be a number, as torchrun sets it, got {text!r}")
    return int(text)
