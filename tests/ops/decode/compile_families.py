"""Compiles the kernels of every family of scores for a GPU that need not be there, a line of JSON a kernel."""

from __future__ import annotations

import json
import sys
from typing import Any

import triton

from hashattn.ops.adc import triton as adc
from hashattn.ops.attend.constants import ROWS
from hashattn.ops.attend.triton import attend_ids
from hashattn.ops.bounds import triton as bounds
from hashattn.ops.decode.device import registers
from hashattn.ops.positions.triton import list_forced
from hashattn.ops.products import triton as products
from hashattn.ops.rabitq import triton as rabitq
from hashattn.ops.select.plan import BINS, CHUNK
from hashattn.ops.select.prepare import WARPS
from hashattn.ops.select.triton import choose, scan
from tests.ops.decode.compile_kernels import compiled

FAMILIES: dict[str, tuple[Any, tuple[int, int, int], int, bool, str, str]] = {  # shape, tile; of query, codes
    "pq": (adc, (8, 16, 256), 512, False, "*i32", "*i64"),
    "pq of 2 bytes": (adc, (2, 2, 64), 512, False, "*i32", "*i16"),
    "pages": (bounds, (16, 128, 16), 128, False, "*fp32", "*bf16"),
    "rabitq": (rabitq, (2, 128, 16), 128, False, "*fp32", "*i32"),
    "rabitq of 96 bits": (rabitq, (2, 96, 16), 128, False, "*fp32", "*i32"),
    "dot": (products, (128, 128, 0), 32, False, "*fp32", "*bf16"),
    "channels": (products, (32, 32, 0), 128, False, "*fp32", "*bf16"),
}
TYPES = {
    "ranks": "*i32", "listed": "*i64", "filled": "*i32", "state": "*i32", "of_query": "i32", "stride": "i32",
    "rows": "i32", "segment": "i32", "T": "i32", "kv_heads": "i32", "k": "i32",
}  # fmt: skip


def main(arch: int) -> None:
    """Scores per query head and summed over a group, the choice, and attention to what was chosen."""
    common = {"CHUNK": CHUNK, "BINS": BINS, "CAUSAL": True, "PDL": arch >= 90}
    for summed in (1, 4) if arch == 90 else (1,):  # one architecture will do for both
        for name, (family, shape, tile, many, query, codes) in FAMILIES.items():
            constants = common | dict(zip("ABC", shape, strict=True)) | {"LOAD": family.load, "SCORE": family.score}
            constants |= {"G": 4, "SUM": summed, "TILE": tile, "RADIUS": False}
            types = TYPES | {"query": query, "codes": codes}
            found = compiled(
                scan,
                constants,
                {"num_warps": WARPS, **registers(divmod(arch, 10), many or (family is products and summed > 1))},
                arch,
                "bf16",
                types,
            )
            print(json.dumps({"kernel": f"scores {name}, {summed} together", **found}), flush=True)
        own = common | {"HEADS": 4 // summed, "SHARE": True}
        found = compiled(
            choose, own, {"num_warps": WARPS, **registers(divmod(arch, 10), many=True)}, arch, "bf16", TYPES
        )
        print(json.dumps({"kernel": f"choice, {summed} together", **found}), flush=True)
        for dim in (64, 128):
            own = {"HEADS": 32 // summed, "KV_HEADS": 8, "SUM": summed, "PADDED": 1 if summed == 1 else 16}
            own |= {"PADDED_OUT": summed, "DIM": dim, "WIDTH": triton.next_power_of_2(dim), "ROWS": ROWS}
            own |= {"PDL": arch >= 90}
            for gathered in (False, True):
                constants = own | dict.fromkeys(["filled", "length"] if gathered else ["weights"])
                found = compiled(
                    attend_ids, constants, {"num_warps": 2} | registers(divmod(arch, 10)), arch, "bf16", TYPES
                )
                name = f"attend D={dim}, {summed} together, gathered={gathered}"
                print(json.dumps({"kernel": name, **found}), flush=True)
        forced = {key: common[key] for key in ("CAUSAL", "PDL")} | {"HEADS": 4 // summed, "TILE": 1024}
        found = compiled(list_forced, forced, {"num_warps": 4}, arch, "bf16", TYPES)
        print(json.dumps({"kernel": f"positions, {summed} together", **found}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
