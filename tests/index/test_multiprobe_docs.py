"""docs/index.md shows what benchmarks/results/multiprobe.json holds."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_docs_show_the_measured_shares():
    found = json.loads((ROOT / "benchmarks/results/multiprobe.json").read_text())
    docs = (ROOT / "docs/index.md").read_text()
    cells = [f"{best['of_flat']:.2f} ({best['of_flat_for_a_group']:.2f})" for best in found["best"]]
    assert len(cells) == 30
    for best, cell in zip(found["best"], cells, strict=True):
        if best["at_recall"] > 0.5:
            (line,) = [x for x in docs.splitlines() if x.startswith(f"| {best['clusters']:,} | {best['k']:,} |")]
            assert cell in line
