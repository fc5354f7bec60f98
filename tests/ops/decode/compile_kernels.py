"""Compiles the decode kernels for a GPU that need not be there and prints what came out, a line of JSON a kernel."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hashattn.ops.decode.sizes import blocking
from hashattn.ops.decode.triton.append import append_rows
from hashattn.ops.decode.triton.calibrate import discount_lists, vote, vote_options
from hashattn.ops.decode.triton.decode import CHUNK, ROWS, attend_options, levels, scan_warps
from hashattn.ops.decode.triton.encode import encode_rows, vectors
from hashattn.ops.decode.triton.encode_many import DEPTH, KEYS, WARPS, encode_tiles
from hashattn.ops.decode.triton.local import ROWS as LOCAL_ROWS
from hashattn.ops.decode.triton.local import SPLIT, attend_chunks, level_bits, search_splits
from hashattn.ops.decode.triton.local import attend_options as local_options
from hashattn.ops.decode.triton.mlp import hidden_layers
from hashattn.ops.decode.triton.scan import scan
from hashattn.ops.decode.triton.topk import attend_topk

POINTERS = {
    "query": "*i64", "codes": "*i64", "counts": "*u16", "parts": "*fp32", "stats": "*fp32",
    "lse": "*fp32", "centre": "*fp32", "sums": "*fp32", "first": "*fp32", "first_bias": "*fp32", "last": "*fp32",
    "last_bias": "*fp32", "query_linear": "*fp32", "query_last": "*fp32", "query_bias": "*fp32", "query_sums": "*fp32",
    "key_linear": "*fp32", "key_last": "*fp32", "key_bias": "*fp32", "key_sums": "*fp32", "stored": "*i64",
    "norms": "*fp16", "new_norms": "*fp16", "a": "*fp32", "tier": "*i8", "linear": "*fp32", "marks": "*i64",
    "weights": "*fp32",
}  # fmt: skip
NUMBERS = (
    "room", "code_room", "least", "radius", "sinks", "recents", "margin", "chunks", "slots", "kv_heads", "queries",
    "new", "count", "splits", "norm_room", "limit", "low_row", "tiles", "votes", "agreement", "prior", "reach",
    "kept_heads", "kept_slots",
)  # fmt: skip


def type_of(fn: Any, name: str, dtype: str) -> str:
    """What Triton calls the type of an argument."""
    if name in ("scale", "per_bit", "ratio"):
        return "fp32"
    if name in ("share", "critical", "of_row", "of_head"):
        return "i64"
    if name in NUMBERS or (name == "k" and fn in (attend_topk, vote)) or (name == "first" and fn is encode_rows):
        return "i32"
    return "*" + dtype if name in ("q", "k", "v", "x", "keys", "values", "out") else POINTERS.get(name, "*i32")


def compiled(
    fn: Any, constants: dict[str, Any], options: dict[str, int], arch: int, dtype: str,
    types: dict[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Stack bytes a thread (where registers would be spilled to), registers, and whether popc is there.

    types: of arguments that are not what their names say elsewhere.
    """
    signature, aligned = {}, {}
    for i, name in enumerate(fn.arg_names):
        own = (types or {}).get(name) or type_of(fn, name, dtype)
        signature[name] = "constexpr" if name in constants else own
        if signature[name].startswith("*") or name in ("room", "code_room"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn, signature=signature, constexprs=constants, attrs=aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return {"registers": int(found[1]), "stack": int(found[2]), "popc": "popc.b64" in kernel.asm["ptx"]}


def encode_constants(
    dim: int, words: int, planes: int, queries: int, hidden: tuple[int, ...], key_hidden: tuple[int, ...], arch: int
) -> dict[str, Any]:  # fmt: skip
    """What a launch of encode_rows fixes for maps of these hidden layers."""
    constants = {
        "T": 1, "DIM": dim, "PADDED": triton.next_power_of_2(dim), "BITS": 64 * words, "WORDS": words,
        "PLANES": planes, "UNIT": bool(hidden), "TILE": vectors(queries, planes), "PDL": arch >= 90,
    }  # fmt: skip
    for of, widths in (("query", hidden), ("key", key_hidden)):
        parts = triton.cdiv(widths[0], blocking(queries)[1]) if len(widths) > 1 else len(widths)
        constants |= {f"{of.upper()}_HIDDEN": widths[-1] if widths else 0, f"{of.upper()}_PARTS": parts}
        if not widths:
            constants |= dict.fromkeys([f"{of}_last", f"{of}_bias", f"{of}_sums"])
    return constants


def main(arch: int) -> None:
    """Those of a step; for H100s also those of LocalTopK, and those that encode and append."""
    common = {"T": 1, "CAUSAL": True, "PDL": arch >= 90, "CHUNK": CHUNK}
    unused = dict.fromkeys(("norms", "centre", "a", "tier"))
    for group, shared, words, planes, dim, dtype in (
        (4, False, 1, 1, 128, "bf16"),
        (4, True, 1, 1, 128, "bf16"),
        (8, False, 2, 1, 64, "fp16"),
        (4, True, 2, 2, 96, "bf16"),
        (2, False, 4, 1, 256, "bf16"),
    ):
        summed = group if shared else 1
        spread = summed * (2**planes - 1)
        bins = 32 if spread == 1 else 64 if spread <= 4 else 128
        lanes = 1 if shared else min(group, 4)
        own = common | {
            "G": group,
            "SUM": summed,
            "WORDS": words,
            "PLANES": planes,
            "BINS": bins,
            "BIASED": words == 2 and not shared,
        }
        attend = own | {
            "PADDED": 16 if shared else 1, "PADDED_OUT": summed, "DIM": dim, "WIDTH": triton.next_power_of_2(dim),
            "CHUNKS": 64, "LEVELS": levels((64 * words + 255 * own["BIASED"]) * spread), "ROWS": ROWS, "SHARE": True,
            "RADIUS": False,
        }  # fmt: skip
        name = f"G={group} shared={shared} W={words} P={planes} D={dim} {dtype}"
        scanning = {"num_warps": scan_warps(words, planes, summed)}
        found = compiled(scan, own | {"LANES": lanes, "marks": None}, scanning, arch, dtype)
        print(json.dumps({"kernel": f"scan {name}", **found}), flush=True)
        for tiers, weighed in ((False, False), (True, False), (True, True), (False, True)):
            constants = attend | {"TIERS": tiers} | ({} if tiers else unused)
            constants |= {} if weighed else {"marks": None, "weights": None}
            options = attend_options(attend["WIDTH"], attend["LEVELS"], tiers or weighed, divmod(arch, 10))
            found = compiled(attend_topk, constants, options, arch, dtype)
            print(json.dumps({"kernel": f"attend {name} tiers={tiers} calibrated={weighed}", **found}), flush=True)
        found = compiled(scan, own | {"LANES": lanes}, scanning, arch, dtype)
        print(json.dumps({"kernel": f"scan {name} calibrated", **found}), flush=True)
        for first in (True, False):
            voting = own | {key: attend[key] for key in ("CHUNKS", "LEVELS", "SHARE")} | {"VOTES": True}
            voting |= {"ids": None, "weights": None} if first else {}
            found = compiled(vote, voting, vote_options(attend["LEVELS"], divmod(arch, 10)), arch, dtype)
            print(json.dumps({"kernel": f"vote {name} first={first}", **found}), flush=True)
        lists = {key: own[key] for key in ("T", "CHUNK", "BINS", "CAUSAL", "PDL")} | {"HEADS": group // summed}
        found = compiled(discount_lists, lists, {"num_warps": 4}, arch, dtype)
        print(json.dumps({"kernel": f"lists {name}", **found}), flush=True)
        if not shared and arch == 90:
            near = {
                "T": 1,
                "G": group,
                "KEEP": 16,
                "BITS": level_bits(words, planes),
                "PDL": arch >= 90,
                "SPLIT": SPLIT,
            }
            search = near | {"WORDS": words, "PLANES": planes, "BIASED": own["BIASED"], "CAUSAL": True}
            found = compiled(search_splits, search, {"num_warps": 4}, arch, dtype)
            print(json.dumps({"kernel": f"local search {name}", **found}), flush=True)
            width = attend["WIDTH"]
            for splits in (1, 4):
                chunks = near | {"DIM": dim, "WIDTH": width, "ENTRIES": 16 * splits, "ROWS": LOCAL_ROWS}
                chunks["CAUSAL"] = True
                found = compiled(attend_chunks, chunks, local_options(width, splits, divmod(arch, 10)), arch, dtype)
                print(json.dumps({"kernel": f"local attend, {splits} splits {name}", **found}), flush=True)
    if arch != 90:
        return
    for dim, words, planes, queries, hidden, key_hidden, dtype in (
        (128, 1, 1, 32, (), (), "bf16"),
        (128, 1, 1, 32, (256, 256), (), "bf16"),
        (128, 2, 1, 256, (256, 256), (), "bf16"),
        (64, 2, 2, 32, (256, 256), (), "fp16"),
        (96, 2, 1, 32, (128, 128), (128, 128), "bf16"),
        (256, 4, 2, 1024, (256,), (), "bf16"),
    ):
        name = f"D={dim} W={words} P={planes} queries={queries} hidden={hidden} {key_hidden} {dtype}"
        encode = encode_constants(dim, words, planes, queries, hidden, key_hidden, arch)
        for norms in (False, True):
            constants = encode | {"PLACED": norms} | ({} if norms else {"norms": None})
            found = compiled(encode_rows, constants, {"num_warps": 8}, arch, dtype)
            print(json.dumps({"kernel": f"encode {name} norms={norms}", **found}), flush=True)
        if hidden:
            tile, units, warps = blocking(queries)
            second = hidden[1] if len(hidden) > 1 else 0
            layer = {
                "T": 1, "room": 1, "centre": None, "DIM": dim, "PADDED": triton.next_power_of_2(dim),
                "FIRST": hidden[0], "LAST": second,
                "WIDTH": triton.next_power_of_2(max(1, second)), "SLICE": units, "TILE": tile, "UNIT": True,
                "PDL": arch >= 90, **dict.fromkeys([] if second else ["last", "last_bias"]),
            }  # fmt: skip
            found = compiled(hidden_layers, layer, {"num_warps": warps}, arch, dtype)
            print(json.dumps({"kernel": f"hidden {name}", **found}), flush=True)
    many = {"HEADS": 8, "BITS": 64, "WORDS": 1, "KEYS": KEYS, "DEPTH": DEPTH}
    for dim, norms, dtype in ((128, True, "bf16"), (96, False, "fp16"), (256, True, "fp32")):
        constants = many | {"DIM": dim} | ({} if norms else {"norms": None, "centre": None})
        found = compiled(encode_tiles, constants, {"num_warps": WARPS}, arch, dtype)
        print(json.dumps({"kernel": f"encode many D={dim} {dtype} norms={norms}", **found}), flush=True)
    append = {"T": 1, "DIM": 96, "PADDED": 128, "WORDS": 2, "TILE": 4}
    for norms in (False, True):
        constants = append | ({} if norms else {"new_norms": None, "norms": None})
        found = compiled(append_rows, constants, {"num_warps": 4}, arch, "bf16")
        print(json.dumps({"kernel": f"append norms={norms}", **found}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
