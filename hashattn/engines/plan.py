"""Query plans: what a decode step will do, read and keep, before it is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hashattn.engines.base import Engine, PlanRow, Request
from hashattn.engines.choose import AUTO, Choice, choose
from hashattn.engines.parts import Parts


@dataclass(frozen=True)
class Plan:
    """One decode step (T = 1) of one layer.

    Attributes:
        engine: "dense", "reference", "cpu" or "gpu".
        stages: (stage, part and engine, remark) for encode, scan, select and attend.
        dense_bytes: read by full attention.
        scan_bytes: read to rank the keys: codes, and the keys that a selector looks at itself.
        attend_bytes: read of selected keys and values, at most (heads of a group may share some).
        code_bytes: memory of codes and norms.
        kv_bytes: memory of keys and values.
        crossover: keys from which "auto" searches on this device; None if it never does.
        provenance: where the crossover was measured.
    """

    engine: str
    stages: tuple[PlanRow, ...]
    dense_bytes: int
    scan_bytes: int
    attend_bytes: int
    code_bytes: int
    kv_bytes: int
    crossover: int | None
    provenance: str

    @property
    def step_bytes(self) -> int:
        """Bytes read by the step."""
        return self.scan_bytes + self.attend_bytes

    def __str__(self) -> str:
        width = max(len(part) for _, part, _ in self.stages)
        lines = [f"engine: {self.engine}", ""]
        lines += [f"  {stage:<8}{part:<{width}}  {remark}".rstrip() for stage, part, remark in self.stages]
        ratio = self.dense_bytes / max(1, self.step_bytes)
        lines += [
            "",
            f"  read per step and layer   {_bytes(self.step_bytes)} (scan {_bytes(self.scan_bytes)}, attend at most "
            f"{_bytes(self.attend_bytes)})",
            f"  full attention reads      {_bytes(self.dense_bytes)}, {ratio:.1f} times as much",
            f"  memory of codes           {_bytes(self.code_bytes)}, "
            f"{self.code_bytes / self.kv_bytes:.1%} of keys and values",
            f"  crossover                 {_crossover(self.crossover)}",
        ]
        if self.crossover is not None and self.provenance:
            lines.append(f"  measured                  {self.provenance}")
        return "\n".join(lines)


def explain(parts: Parts, request: Request, keys: int, wanted: str) -> Plan:
    """See :meth:`HashAttention.explain`.

    Raises:
        ValueError: the engine that is wanted does not serve the step.
    """
    choice = choose(parts, request, wanted)
    engine = choice.at(keys)
    size = step_bytes(parts, request, keys, engine.searches)
    stage, remark = ("scan" if engine.searches else "attend"), _why(engine, choice, parts)
    rows = [
        row._replace(remark=remark) if row.stage == stage and not row.remark else row
        for row in engine.rows(parts, request)
    ]
    return Plan(engine.name, tuple(rows), *size, choice.crossover, choice.measured)


def _why(engine: Engine, choice: Choice, parts: Parts) -> str:
    """Why it is this engine, where a faster one might have been expected."""
    if not parts.searches:
        return "the composition attends densely"
    home = choice.home or engine
    cannot = choice.reasons[home.name]
    if not engine.searches:
        if choice.wanted != AUTO:
            return f'engine="{choice.wanted}" was asked for'
        if choice.crossover is not None:
            return "below the crossover"
        if not cannot:
            return "nothing faster was measured on this device"
        return f'engine="{home.name}" cannot take it: {"; ".join(cannot)}'
    if engine.device is not None or home.runs_as(parts)[0] == engine.name:
        return ""
    return f'engine="{home.name}" cannot: {"; ".join(cannot)}' if cannot else f'engine="{home.name}" is faster here'


class Bytes(NamedTuple):
    """What a step reads, and what is kept: see :class:`Plan`."""

    dense: int
    scan: int
    attend: int
    code: int
    kv: int


def step_bytes(parts: Parts, request: Request, keys: int, searches: bool) -> Bytes:
    """Bytes of a step over so many keys, if it searches or if it attends densely."""
    encoder, index, selector, row = parts.encoder, parts.index, parts.selector, request.row_bytes
    kv = keys * request.key_bytes
    code = code_row = codes = 0
    if encoder is not None and index is not None:
        code_row = encoder.code_bytes(request.head_dim, request.dtype.itemsize)
        codes = request.batch * encoder.code_heads(request.kv_heads) * keys
        code = round(codes * index.key_bytes(code_row))
    if parts.attend.needs_norms:
        code += 2 * request.batch * request.kv_heads * keys
    if not searches or selector is None:
        return Bytes(kv, 0, kv, code, kv)
    heads, times = selector.choices(request.q_heads, request.kv_heads)
    heads *= request.batch
    kept, critical = (min(keys, times * n) for n in (selector.budget(keys), selector.critical(keys)))
    attend = heads * kept * 2 * row
    if parts.attend.needs_norms:  # medium keys cost a value, a norm and a code, not a key
        attend = heads * (critical * 2 * row + (kept - critical) * (row + 2 + code_row))
    scan = heads * min(keys, times * selector.keys_read(keys)) * row
    if parts.ranks and index is not None:
        scan += round(codes * index.read_bytes(code_row))
    return Bytes(kv, scan, attend, code, kv)


def _crossover(least: int | None) -> str:
    if least is None:
        return '"auto" runs dense here: no length is known from which this kind of step wins'
    return f'"auto" runs dense below {least:,} keys on this device'


def _bytes(n: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n = n / 1024  # type: ignore[assignment]
    return f"{n:.1f} GiB"
