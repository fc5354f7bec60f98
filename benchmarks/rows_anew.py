"""Puts rows that were measured anew in place of the old ones of a results file, and says so in its notes.

    hashattn eval --presets pyramidkv:layers=30 ... --json new.json        # the command of the file, fewer presets
    python benchmarks/rows_anew.py benchmarks/results/eval_looking_back_smollm2-135m.json new.json

What the presets are compared with, full attention and exact top-k, stays as it is in the file. A preset that the file
lacks is added at the end. Both must have been measured by the same settings; several new files of the same presets and
other seeds, as processes beside each other write them, are summed up first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hashattn.core.files import replacing
from hashattn.lab.evaluation.report import summarise

COMPARED = ("full attention", "oracle_topk")
Result = dict[str, Any]


def anew(old: Result, new: Result) -> Result:
    """The old result with the new one's rows.

    Raises:
        ValueError: they were measured by other settings, on another text or model, or there is nothing new.
    """
    for name in ("settings", "model", "text", "sha256", "share", "dtype"):
        if old[name] != new[name]:
            raise ValueError(f"{name} differ: {old[name]!r} in the old result, {new[name]!r} in the new one")
    fresh: dict[str, list[dict[str, Any]]] = {}
    for row in new["rows"]:
        if row["contender"] not in COMPARED:
            fresh.setdefault(row["contender"], []).append(row)
    if not fresh:
        raise ValueError(f"the new result holds nothing but {', '.join(COMPARED)}")
    rows, left = [], dict(fresh)
    for row in old["rows"]:
        if row["contender"] not in fresh:
            rows.append(row)
        elif row["contender"] in left:
            rows += left.pop(row["contender"])
    rows += [row for added in left.values() for row in added]
    said = f"{', '.join(fresh)}: measured anew on {new['date']}, {new['device']}, torch {new['versions']['torch']}"
    kept = [note for note in old["notes"] if not note.startswith(f"{', '.join(fresh)}: ")]
    return old | {"rows": rows, "notes": [*kept, said]}


def together(parts: Sequence[Result]) -> list[Result]:
    """Results of the same presets, summed up over their seeds; those of other presets by themselves."""
    groups: dict[frozenset[str], list[Result]] = {}
    for part in parts:
        groups.setdefault(frozenset(row["contender"] for row in part["rows"]), []).append(part)
    found = []
    for group in groups.values():
        whole = group[0]
        if len(group) > 1:
            seeds = sorted(seed for part in group for seed in part["settings"]["seeds"])
            for part in group:
                if {**part["settings"], "seeds": None} != {**whole["settings"], "seeds": None}:
                    raise ValueError(f"settings differ: {whole['settings']!r} and {part['settings']!r}")
            rows = summarise(record for part in group for record in part["records"])
            whole = whole | {"settings": whole["settings"] | {"seeds": seeds}, "rows": rows}
        found.append(whole)
    return found


def main(given: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD.json", help="the results file, which is replaced")
    parser.add_argument("new", type=Path, nargs="+", metavar="NEW.json", help="of the same command with fewer presets")
    chosen = parser.parse_args(given)
    text = chosen.old.read_text(encoding="utf-8")
    result = json.loads(text)
    for new in together([json.loads(path.read_text(encoding="utf-8")) for path in chosen.new]):
        result = anew(result, new)
    indent = 1 if "\n" in text.strip() else None
    with replacing(chosen.old) as path:
        path.write_text(json.dumps(result, indent=indent) + ("\n" if text.endswith("\n") else ""), encoding="utf-8")


if __name__ == "__main__":
    main()
