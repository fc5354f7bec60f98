"""Tables in Markdown, and a picture, of what `hashattn bench --recall --out` has written.

python benchmarks/recall_tables.py [FILE.json ...] [--plot FILE.png]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hashattn.bench.recall_report import HEAD, cells, save_plot, sorted_rows

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results" / "recall.json"


def read(paths: Sequence[Path]) -> list[Row]:
    """The rows of all files."""
    return [row for path in paths for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def table(rows: Sequence[Row], data: str) -> str:
    """Markdown, those that keep most first."""
    lines = [HEAD, ["---"] * len(HEAD), *(cells(row, rows) for row in sorted_rows(rows, data))]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sections(rows: Sequence[Row]) -> str:
    """A table for each data set."""
    return "\n\n".join(f"### {data}\n\n{table(rows, data)}" for data in dict.fromkeys(row["data"] for row in rows))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE.json", help=f"results (default: {RESULTS.name})")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write the picture to this file")
    chosen = parser.parse_args()
    rows = read(chosen.files or [RESULTS])
    print(sections(rows))
    if chosen.plot:
        save_plot(rows, chosen.plot)


if __name__ == "__main__":
    main()
