"""Query plans: what a decode step will do, read and keep, before it is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hashattn.core.checks import check_int
from hashattn.engines.choose import Shape, crossover, provenance, resolve
from hashattn.engines.gpu import request_of, rule_of, why_not
from hashattn.ops.decode import kernels_on, served_by, why_not_encode

if TYPE_CHECKING:
    from hashattn.attention import HashAttention
    from hashattn.encoders import Encoder
    from hashattn.selectors import Selector

Asked = tuple[torch.device, torch.dtype, tuple[int, int, int]]  # heads: query heads, KV heads, dimensions


@dataclass(frozen=True)
class Plan:
    """One decode step (T = 1) of one layer.

    Attributes:
        engine: "dense", "reference", "cpu" or "triton".
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
    stages: tuple[tuple[str, str, str], ...]
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


def explain(
    attn: HashAttention, batch: int, q_heads: int, kv_heads: int, head_dim: int, keys: int, device: str,
    dtype: torch.dtype,
) -> Plan:  # fmt: skip
    """See :meth:`HashAttention.explain`.

    Raises:
        ValueError: sizes below 1, or q_heads that is no multiple of kv_heads.
    """
    sizes = {"batch": batch, "q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim, "keys": keys}
    batch, q_heads, kv_heads, head_dim, keys = (check_int(name, size, 1) for name, size in sizes.items())
    if q_heads % kv_heads:
        raise ValueError(f"q_heads must be a multiple of kv_heads, got {q_heads} and {kv_heads}")
    kind = torch.device(device).type
    unfused = why_not(
        attn, device=kind, dtype=dtype, q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim, batch=batch
    )
    shape, least = Shape(batch, q_heads, kv_heads, head_dim, dtype.itemsize), None
    if kind != "cuda" or unfused is None:
        least = crossover(attn, device, shape)
    engine = resolve(attn, kind, keys, least, unfused)
    row = head_dim * dtype.itemsize
    kv_bytes = 2 * batch * kv_heads * keys * row
    code_bytes = code_row = codes = 0
    if attn.encoder is not None:
        assert attn.index is not None
        code_row = attn.encoder.code_bytes(head_dim, dtype.itemsize)
        codes = batch * attn.encoder.code_heads(kv_heads) * keys
        code_bytes = round(codes * attn.index.key_bytes(code_row))
    if attn.attend.needs_norms:
        code_bytes += 2 * batch * kv_heads * keys
    scan_bytes, attend_bytes = 0, kv_bytes
    if engine != "dense" and attn.selector is not None:
        heads, times = attn.selector.choices(q_heads, kv_heads)
        kept, critical = (min(keys, times * n) for n in (attn.selector.budget(keys), attn.selector.critical(keys)))
        if attn.attend.needs_norms:  # medium keys cost a value, a norm and a code, not a key
            attend_bytes = batch * heads * (critical * 2 * row + (kept - critical) * (row + 2 + code_row))
        else:
            attend_bytes = batch * heads * kept * 2 * row
        if attn.selector.ranked and attn.encoder is not None:
            assert attn.index is not None
            scan_bytes = round(codes * attn.index.read_bytes(code_row))
        scan_bytes += batch * heads * min(keys, times * attn.selector.looked_at(keys)) * row
    asked = (torch.device(device), dtype, (q_heads, kv_heads, head_dim))
    stages = _stages(attn, engine, asked, least, unfused)
    return Plan(
        engine, stages, kv_bytes, scan_bytes, attend_bytes, code_bytes, kv_bytes, least, provenance(device, shape)
    )


def _crossover(least: int | None) -> str:
    if least is None:
        return '"auto" runs dense here: no length is known from which this kind of step wins'
    return f'"auto" runs dense below {least:,} keys on this device'


def _stages(
    attn: HashAttention, engine: str, asked: Asked, least: int | None, unfused: str | None
) -> tuple[tuple[str, str, str], ...]:
    device = asked[0]
    if engine == "dense":
        why = "the composition attends densely"
        if attn.attend.needs_selection:
            why = 'engine="dense" was asked for'
            if attn.engine == "auto":
                why = "below the crossover" if least is not None else "nothing faster was measured on this device"
                if device.type == "cuda" and unfused is not None:
                    why = f'engine="triton" cannot take it: {unfused}'
        return (("attend", "full attention (PyTorch SDPA, grouped heads)", why),)
    binary = attn.index is not None and attn.index.flat_codes
    fast = engine == "cpu" and binary
    scan = "FAISS's scan (numpy without FAISS)" if fast else "PyTorch, plain operations" if binary else "PyTorch"
    slow = ""
    if engine == "reference":
        slow = 'engine="cpu" scans faster here' if binary else ""
        if device.type != "cpu":
            slow = 'engine="triton" is faster' if unfused is None else f'engine="triton" cannot: {unfused}'
    elif not binary and attn.encoder is not None:
        slow = "the reference serves it"
    elif attn.selector is not None and attn.selector.matrices:
        slow = "a matrix of all distances is made"
    if attn.index is not None and attn.index.remark():
        scan, slow = "its own search", attn.index.remark()
    if engine == "triton":
        return _fused_stages(attn, asked)
    rows = []
    if attn.encoder is not None and attn.selector is not None and attn.selector.ranked:
        rows = [
            ("encode", f"{_name(attn.encoder)}: PyTorch", "one token's query and key; keys late and in bulk"),
            ("scan", f"{_name(attn.index)}: {scan}", slow),
        ]
    select = "numpy or PyTorch" if fast else "PyTorch top-k"
    exact = "exact, ties to the most recent key" if attn.index is None or attn.index.scans else "of what was found"
    rows.append(("select", f"{_select(attn.selector)}: {select}", exact))
    rows.append(("attend", f"{_name(attn.attend)}: gather and softmax in PyTorch", ""))
    return tuple(rows)


def _fused_stages(attn: HashAttention, asked: Asked) -> tuple[tuple[str, str, str], ...]:
    device, _, (q_heads, kv_heads, _) = asked
    rule = rule_of(attn, q_heads // kv_heads)
    assert rule is not None
    kernels, slower = served_by(request_of(attn, *asked, rule))
    language = kernels.language
    listed = "lists the keys near the last step's threshold"
    if rule.chunks is not None:
        listed = "keeps the nearest of each chunk"
    if slower:
        listed += f"; {'; '.join(slower)}"
    one = "the same kernel" if rule.chunks is not None and not slower else "one kernel"
    return (
        _encode_on_a_gpu(attn.encoder, device),
        ("scan", f"{_name(attn.index)}: {language}, one kernel", listed),
        ("select", f"{_select(attn.selector)}: {language}, {one} with attend", "exact, ties to the most recent key"),
        ("attend", f"{_name(attn.attend)}: {language}", "split over the selected keys"),
    )


def _encode_on_a_gpu(encoder: Encoder | None, device: torch.device) -> tuple[str, str, str]:
    reasons = why_not_encode(encoder.widths()) if encoder is not None else []
    if reasons:
        return "encode", f"{_name(encoder)}: PyTorch", "; ".join(reasons)
    return (
        "encode",
        f"{_name(encoder)}: {kernels_on(device).language} in a decoder, else PyTorch",
        "a decoder appends in the same kernel",
    )


def _select(selector: Selector | None) -> str:
    text = repr(selector)
    return text if selector is None or (len(text) <= 60 and "\n" not in text) else selector.name()


def _name(part: object) -> str:
    text = repr(part)
    return text if len(text) <= 60 and "\n" not in text else type(part).__name__


def _bytes(n: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n = n / 1024  # type: ignore[assignment]
    return f"{n:.1f} GiB"
