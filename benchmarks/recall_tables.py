"""Tables in Markdown, and a picture, of what `hashattn bench recall --out` has written.

python benchmarks/recall_tables.py [FILE.json ...] [--plot FILE.png]
python benchmarks/recall_tables.py --predictions      what some presets do to SmolLM2's predictions
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from hashattn.lab.bench.recall_report import HEAD, cells, save_plot, sorted_rows
from hashattn.lab.report import Row, markdown

RESULTS = Path(__file__).parent / "results" / "recall.json"
PREDICTED = tuple(RESULTS.with_name(f"eval_{name}_smollm2-135m.json") for name in ("peers", "looking_back"))


def read(paths: Sequence[Path]) -> list[Row]:
    """The rows of all files."""
    return [row for path in paths for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def table(rows: Sequence[Row], data: str) -> str:
    """Markdown, those that keep most first."""
    return markdown([HEAD, *(cells(row, rows) for row in sorted_rows(rows, data))])


def sections(rows: Sequence[Row]) -> str:
    """A table for each data set."""
    return "\n\n".join(f"### {data}\n\n{table(rows, data)}" for data in dict.fromkeys(row["data"] for row in rows))


def predictions(paths: Sequence[Path] = PREDICTED) -> str:
    """What presets do to perplexity, the best of each file first, and exact top-k's of the first file."""
    shown = []
    for path in paths:
        rows = [row for row in read([path]) if "ratio_above_exact" in row["figures"]]
        if not shown:
            (exact,) = (row for row in read([path]) if row["contender"] == "oracle_topk")
            shown.append(f"| exact top-k | {_half(exact['figures']['ratio'], '.3f')} | |")
        for row in sorted(rows, key=lambda row: float(row["figures"]["ratio"]["mean"])):
            name = re.sub(r"[:,]pretrained=[^,]*", "", row["contender"])
            figures = row["figures"]
            shown.append(
                f"| `{name}` | {_half(figures['ratio'], '.3f')} | {_half(figures['ratio_above_exact'], '.4f', '+')} |"
            )
    return "\n".join(["| | perplexity ratio | minus exact top-k's |", "|---|---|---|", *shown])


def _half(figure: dict[str, float], form: str, sign: str = "") -> str:
    """A mean and half of its interval."""
    return f"{figure['mean']:{sign}{form}} ± {(figure['high'] - figure['low']) / 2:{form}}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE.json", help=f"results (default: {RESULTS.name})")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write the picture to this file")
    parser.add_argument("--predictions", action="store_true", help=f"of {', '.join(p.name for p in PREDICTED)}")
    chosen = parser.parse_args()
    if chosen.predictions:
        print(predictions())
        return
    rows = read(chosen.files or [RESULTS])
    print(sections(rows))
    if chosen.plot:
        save_plot(rows, chosen.plot)


if __name__ == "__main__":
    main()
