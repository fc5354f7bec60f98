"""What a step costs on a CPU, and from how many keys on a search pays there."""

from __future__ import annotations

import dataclasses
import functools
import math
import platform
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from hashattn.core.files import default_cache_dir
from hashattn.core.json_files import read_json, write_json
from hashattn.core.threads import thread_count
from hashattn.engines.base import Request
from hashattn.engines.parts import Parts

_MARGIN = 0.85  # "auto" searches where this share of dense attention's time is not exceeded
_LARGEST = 1 << 24
_ESTIMATE = 1.6  # a gathered key costs so much more where logits are estimated from codes
# Nanoseconds of a compiled step: for each multiplication of the queries' MLP, for each key that a head of the layer
# before kept, and for a residual of each medium key. A second pass over distances costs as much as a choice.
_PRODUCT, _FOLLOWED, _RESIDUAL = 0.045, 3.0, 170.0


@dataclass(frozen=True)
class Costs:
    """What compiled steps and dense attention cost on one thread of a CPU, in memory that is not in a cache.

    Attributes:
        call: microseconds of a step, however small.
        word: nanoseconds for each word of a plane compared with a key.
        choice: nanoseconds for each key of a choice.
        row, byte: nanoseconds for each row gathered, and for each byte of it.
        stream, stream_16: bytes a microsecond that dense attention reads, of float32 and of 16-bit types.
        source: where it was measured.
    """

    call: float
    word: float
    choice: float
    row: float
    byte: float
    stream: float
    stream_16: float
    source: str

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "source":
                if not isinstance(value, str):
                    raise ValueError(f"source must be a text, got {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
                raise ValueError(f"{field.name} must be a number of at least 0, got {value!r}")


SHIPPED = Costs(229.5, 0.3023, 0.3221, 21.43, 0.1142, 5_994.6, 4_748.7, "benchmarks/results/crossover_cpu.json")

# Of steps in stages, fitted to benchmarks/results/bench_cpu*.json of such steps: microseconds a call, nanoseconds for
# each planes of codes compared with a key, for each further pass over a matrix of distances and for each number
# gathered (which costs a miss more than its bytes), and bytes a microsecond that dense attention reads.
_CALL, _PAIR, _PASS, _GATHER = 220.0, 0.84, 12.0, 0.34
_STREAM, _STREAM_16 = 11_500.0, 8_500.0
_STAGES = "benchmarks/results/bench_cpu*.json"


def kept_file() -> Path:
    """Where `hashattn bench crossover --device cpu` keeps what it measured on this machine.

    Raises:
        OSError: the user has no home folder.
    """
    return default_cache_dir() / "cpu-costs.json"


@functools.cache
def costs() -> Costs:
    """What was measured on this machine, else what comes with the library."""
    try:
        path = kept_file()
        if not path.exists():
            return SHIPPED
        held = read_json(path)
        if held.pop("cpu", None) != cpu_name():
            return SHIPPED  # a folder that machines share
        return Costs(**held)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(
            f"what was measured of this CPU cannot be read, so that shipped figures are used: {error}; "
            "`hashattn bench crossover --device cpu` measures anew",
            stacklevel=2,
        )
        return SHIPPED


def keep(measured: Costs) -> Path:
    """Let this machine's steps be chosen by what was measured on it. Returns the file.

    Raises:
        OSError: it cannot be written.
    """
    path = kept_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"cpu": cpu_name()} | dataclasses.asdict(measured))
    costs.cache_clear()
    return path


def cpu_name() -> str:
    """What this machine's CPU calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def source(compiled: bool) -> str:
    """Where the figures are from."""
    return costs().source if compiled else _STAGES


def crossover(parts: Parts, request: Request, compiled: bool = False, known: Costs | None = None) -> int | None:
    """Visible keys from which a search is clearly faster than dense attention; None if it never is.

    Args:
        compiled: whether it is a compiled step; known: what these cost, costs() if None.
    """
    low, high = 1, _LARGEST
    if not pays(parts, request, high, compiled, known):
        return None
    while low < high:
        middle = (low + high) // 2
        if pays(parts, request, middle, compiled, known):
            high = middle
        else:
            low = middle + 1
    return low


def pays(parts: Parts, request: Request, keys: int, compiled: bool = False, known: Costs | None = None) -> bool:
    """Whether a search over so many keys is expected to be clearly faster than dense attention."""
    if compiled:
        dense, step = compiled_microseconds(parts, request, keys, known or costs())
    else:
        dense, step = step_microseconds(parts, request, keys)
    return step <= _MARGIN * dense


def compiled_microseconds(parts: Parts, request: Request, keys: int, known: Costs) -> tuple[float, float]:
    """Expected time of dense attention and of a compiled step, over so many keys."""
    selector, encoder = parts.selector, parts.encoder
    assert selector is not None and encoder is not None
    heads, _ = selector.choices(request.q_heads, request.kv_heads)
    kept, critical = min(keys, selector.budget(keys)), min(keys, selector.critical(keys))
    words = -(-encoder.bits // 64) * encoder.query_bits * request.q_heads * request.batch
    rows, choices = request.batch * heads * (kept + critical), request.batch * heads
    other = _encoding(parts, request)
    if parts.attend.needs_norms:
        rows += int(choices * (kept - critical) * (_ESTIMATE - 1))
        other += 0 if parts.attend.fused else choices * (kept - critical) * _RESIDUAL
    else:
        rows = choices * 2 * kept
    rule, passes = selector.rule(request.group), 1
    if rule is not None and rule.calibrated:
        passes, other = 2, other + choices * kept * _FOLLOWED
    work = keys * (words * known.word + passes * choices * known.choice) + other
    work += rows * (known.row + known.byte * request.row_bytes)
    stream = known.stream if request.dtype.itemsize >= 4 else known.stream_16
    return keys * request.key_bytes / stream / thread_count(request.threads), known.call + work / 1000


def _encoding(parts: Parts, request: Request) -> float:
    """Nanoseconds of the queries' MLP; linear maps are part of every call."""
    widths = parts.encoder.widths() if parts.encoder is not None else None
    if parts.encoder is None or widths is None or not widths[0]:
        return 0.0
    layers = pairwise((request.head_dim, *widths[0], parts.encoder.bits))
    return request.batch * request.q_heads * sum(a * b for a, b in layers) * _PRODUCT


def step_microseconds(parts: Parts, request: Request, keys: int) -> tuple[float, float]:
    """Expected time of dense attention and of a search in stages, over so many keys that are not in a cache."""
    selector, threads = parts.selector, thread_count(request.threads)
    assert selector is not None
    heads, times = selector.choices(request.q_heads, request.kv_heads)
    kept = min(keys, times * selector.budget(keys))
    gathered = request.batch * heads * kept * 2 * request.head_dim * (_ESTIMATE if parts.attend.needs_norms else 1)
    gathered += request.batch * heads * min(keys, times * selector.keys_read(keys)) * request.head_dim
    scans = passes = 0.0
    if selector.ranked and parts.encoder is not None:
        group, planes = request.group, parts.encoder.query_bits
        per_head = math.ceil(math.log2(group * (2**planes - 1) + 1)) if heads == request.kv_heads else group * planes
        words = -(-parts.encoder.bits // 64)
        scans = request.batch * request.kv_heads * per_head * keys * max(1, words) / 2
        passes = request.batch * request.q_heads * keys * selector.matrices
    stream = _STREAM if request.dtype.itemsize >= 4 else _STREAM_16  # 16-bit types are converted as it goes
    dense = keys * request.key_bytes / stream / threads
    return dense, _CALL + (scans * _PAIR + passes * _PASS + gathered * _GATHER / threads) / 1000
