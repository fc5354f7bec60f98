"""`hashattn explain`: the query plan of presets, with the options that `hashattn eval` takes."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from hashattn.core.errors import UserError, refusals
from hashattn.fitted.saving import from_pretrained
from hashattn.lab.checks import named_device
from hashattn.lab.evaluation.contenders import DENSE, Contender, dense_layers, written
from hashattn.lab.options import DTYPES, add_choices, add_numbers, add_presets, begin
from hashattn.presets import preset, takes_budget

# A layer of Llama-3-8B, where no fitted encoders say of which model they are.
SIZES = {"q_heads": 32, "kv_heads": 8, "head_dim": 128}


def add(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    command = begin(
        commands,
        "explain",
        run,
        "the query plan of a preset",
        "What one decode step of one layer does, reads and keeps: engines, bytes beside those of full "
        "attention, memory of codes, and from how many keys on a search is worth it.",
    )
    add_presets(command, "presets", nargs="*", default=["dashkv"])
    add_choices(command, None)
    add_numbers(command, int, {"batch": "sequences that are decoded together"}, argparse.Namespace(batch=1))
    words = {"q_heads": "query heads", "kv_heads": "KV heads", "head_dim": "numbers of a head"}
    told = {
        n: f"{word} of the layer; those of --encoder's model, else {SIZES[n]}, if left out" for n, word in words.items()
    }
    add_numbers(command, int, told)
    command.add_argument("--keys", "--tokens", type=int, default=131072, metavar="N", help="in the cache, in tokens")
    command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of keys and values")
    command.add_argument("--device", default="cpu", metavar="cpu|cuda", help="where it would run; it need not be there")


def run(arguments: argparse.Namespace) -> int:
    """Print a plan for each preset, budget and choice of dense layers; returns the exit status."""
    with refusals():
        kind = named_device(arguments.device).type
        if kind not in ("cpu", "cuda"):
            raise UserError(f"--device {arguments.device}: plans are known for cpu and cuda")
        shape = _shape(arguments)
        plans = [(entry, _plan(entry, shape, arguments, kind)) for entry in _entries(arguments)]
    for i, (entry, plan) in enumerate(plans):
        about = (preset(entry.preset).__doc__ or "no description").strip().splitlines()[0]
        budget = "" if entry.budget is None else f", {entry.budget:.3g} of the keys"
        print(f"{'' if i == 0 else chr(10)}{entry.label}{budget}: {about}\n\n{plan}")
    return 0


def _entries(arguments: argparse.Namespace) -> list[Contender]:
    found = []
    for text, name, options in written(arguments.presets, arguments.encoder):
        for budget in arguments.budget or [None]:
            if budget is not None and not takes_budget(name, options):
                raise UserError(f"--budget {budget}: preset {name!r} takes no share of the keys; leave it out, or own")
            found += [Contender(text, name, options, budget, dense) for dense in arguments.dense_layers]
    for dense in arguments.dense_layers:
        if dense not in DENSE:
            dense_layers(dense)
    return found


def _shape(arguments: argparse.Namespace) -> dict[str, int]:
    """Heads and their size: those given, else those of the model that the encoders were fitted to, else SIZES.

    Raises:
        UserError: a size that is not that model's.
    """
    facts = None if arguments.encoder is None else from_pretrained(arguments.encoder).facts
    shape = {}
    for name, usual in SIZES.items():
        given = getattr(arguments, name)
        if given is not None and facts is not None and given != getattr(facts, name):
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{option} {given}: --encoder was fitted to a model with {getattr(facts, name)}; leave it out"
            )
        shape[name] = given if given is not None else usual if facts is None else getattr(facts, name)
    return shape


def _plan(entry: Contender, shape: dict[str, int], arguments: argparse.Namespace, device: str) -> str:
    attn = entry.composition(arguments.keys)
    plan = attn.explain(
        **shape, batch=arguments.batch, keys=arguments.keys, device=device, dtype=getattr(torch, arguments.dtype)
    )
    notes = []
    if attn.encoder is not None:
        attn.encoder.check_model(**shape)
        try:
            attn.encoder.check_fitted()
        except RuntimeError as error:
            notes.append(str(error))
    if attn.dense_layers:
        notes.append(f"layers {', '.join(map(str, attn.dense_layers))} of a model attend densely instead")
    return "\n".join([str(plan), *(f"note: {note}" for note in notes)])
