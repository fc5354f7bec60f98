"""`hashattn fit`: its arguments, and what it says."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

import torch

from hashattn.core.errors import refusals
from hashattn.lab.checks import check_folder, device_of
from hashattn.lab.learning.fit_folder import FitFolder, read_asked
from hashattn.lab.learning.recipe import ENCODERS, HEADS, Recipe
from hashattn.lab.options import PRESET, add_device, add_numbers, add_words, begin, from_options, takes_long
from hashattn.lab.report import aligned
from hashattn.presets.parsing import parse

_WHOLE = {
    "bits": "length of a code, 8 to 1024",
    "bias_bits": "of these, for a scalar of each key (asymmetric, query-bits 1)",
    "query_bits": "bit planes of a query: 1, 2, 4 or 8",
    "steps": "of Adam a layer, at most",
    "queries": "queries drawn at each step",
    "seed": "of weights and draws",
    "every": "steps between two looks at the held-out sequences",
    "patience": "looks without a better recall after which a layer stops; 0 for never",
}
_REAL = {
    "lr": "peak learning rate",
    "temperature": "of the teacher's softmax (kl)",
    "held_out": "share of the sequences of each kind, the last ones, that are never fitted to",
    "budget": "share of the keys that recall and mass are taken at",
}


def add(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    default = Recipe()
    command = begin(
        commands,
        "fit",
        run,
        "fit encoders to captured queries and keys",
        "Fits an encoder to each layer that hashattn capture wrote to SHARDS, and saves them together in "
        "DIR/pretrained, for from_preset(..., pretrained=...). The same command resumes what was stopped. Under "
        "torchrun each process takes its share of the layers.",
    )
    takes_long(command, stopped)
    command.add_argument("shards", metavar="SHARDS", help="folder that hashattn capture filled")
    add_words(command, {"out": ("DIR", "new or empty folder, or one to resume")}, required=True)
    shape = "fit the encoder of this preset, such as pqcache:subquantisers=16; its shape is then the preset's"
    add_words(command, {"preset": (PRESET, shape)})
    itq = "itq takes bits and query-bits only"
    command.add_argument("--encoder", choices=ENCODERS, default=default.encoder, help=itq)
    widths = "widths of the query MLP, none for a linear query; 256 256 if left out"
    add_words(command, {"query_hidden": ("N|none", widths)}, nargs="+")
    heads = "one set of weights a layer, or a KV head"
    command.add_argument("--heads", choices=HEADS, default=default.heads, help=heads)
    add_words(command, {"loss": ("TERMS", 'such as "kl + 0.1 * balance"')}, default=default.loss)
    add_numbers(command, int, _WHOLE, default)
    add_numbers(command, float, _REAL, default)
    add_numbers(command, int, {"layers": "layers; all captured ones if left out"}, nargs="+")
    add_device(command)
    more = "also fit the discounts of consensus and momentum, and the estimates of medium keys' logits"
    command.add_argument("--calibrate", action="store_true", help=more)


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
    how = {"device": device, "calibrate": arguments.calibrate, "progress": not arguments.quiet}
    part = {"layers": arguments.layers, "rank": rank, "world": world}
    saved = fit_layers(shards, arguments.out, recipe, **part, **how)
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
    return from_options(Recipe, arguments, query_hidden=_widths(arguments.query_hidden))


def table(records: list[dict[str, Any]]) -> str:
    """A line a layer, and the mean."""
    rows: list[Sequence[str]] = [("layer", "best step", "recall", "mass", "seconds")]
    rows += [
        (str(r["layer"]), f"{r['best_step']:,}", f"{r['recall']:.3f}", f"{r['mass']:.3f}", f"{r['seconds']:.0f}")
        for r in records
    ]
    recall, mass = (sum(r[name] for r in records) / len(records) for name in ("recall", "mass"))
    rows.append(("mean", "", f"{recall:.3f}", f"{mass:.3f}", f"{sum(r['seconds'] for r in records):.0f}"))
    return aligned(rows)


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
