"""The house: which room may use which, what stands at the root, and in how many places something new is added."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hashattn import (
    Centring,
    DenseAttend,
    ExactAttend,
    FlatHamming,
    HashAttention,
    KVCache,
    MixedPrecision,
    RandomTail,
    Recent,
    Refine,
    SampledAttend,
    Selection,
    Selector,
    SimHash,
    Sink,
    Step,
    Tiers,
    TopK,
)
from hashattn.encoders.base import Encoder, key_bits
from hashattn.engines import choose
from hashattn.engines.base import Engine, PlanRow, PreparedStep, Request
from hashattn.engines.parts import Parts
from hashattn.engines.stages import Reference
from hashattn.index.view import View
from hashattn.ops import decode
from hashattn.ops.decode.kernels import Decode
from hashattn.ops.decode.specification import Specification
from hashattn.store import KVStore

HOUSE = Path(__file__).parents[1] / "hashattn"
FLOORS = (  # from the ground up: what stands on a floor uses the floors below, and its own room
    ("core",),
    ("ops",),
    ("index", "encoders", "attend", "selectors"),
    ("store",),
    ("cache",),
    ("engines",),
    ("attention",),
    ("fitted",),
    ("presets",),
    ("integrations", "testing"),
    ("lab",),
    ("cli",),
)
DOORS = {  # imports that run upwards or sideways, and why
    ("hashattn.attention", "hashattn.presets"): "from_preset",
    ("hashattn.attention", "hashattn.integrations.transformers"): "attach",
    ("hashattn", "hashattn.integrations.transformers"): "detach",
    ("hashattn.selectors", "hashattn.index.view"): "selectors choose by a view of the index",
    ("hashattn.attend", "hashattn.index.view"): "estimates read a view of the index",
    ("hashattn.testing", "hashattn"): "what a repr says is evaluated with the public names",
}


def modules() -> dict[str, Path]:
    found = {}
    for path in HOUSE.rglob("*.py"):
        parts = path.relative_to(HOUSE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports anywhere: for types alone, and within functions, as well."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "hashattn")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hashattn":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)


GRAPH = {name: sorted(set(imports(path)) - {name}) for name, path in MODULES.items()}


def room(module: str) -> str:
    return ".".join(module.split(".")[1:2])


def floor(name: str) -> int:
    return next((i for i, rooms in enumerate(FLOORS) if name in rooms), len(FLOORS))  # the front: hashattn, __main__


def is_door(user: str, used: str) -> bool:
    return any(within(user, of) and within(used, into) for of, into in DOORS)


def within(module: str, place: str) -> bool:
    return module == place or (place != "hashattn" and module.startswith(f"{place}."))


def test_imports_run_downwards():
    upwards = [
        f"{user} uses {used}"
        for user, all_used in GRAPH.items()
        for used in all_used
        if room(used) != room(user) and floor(room(used)) >= floor(room(user)) and not is_door(user, used)
    ]
    assert upwards == []


def circles() -> list[list[str]]:
    """Strongly connected modules (Tarjan), packages' own faces aside: who imports a part imports its package first."""
    found: list[list[str]] = []
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(name: str) -> None:
        number[name] = low[name] = len(number)
        stack.append(name)
        for used in GRAPH[name]:
            if is_door(name, used) and floor(room(used)) > floor(room(name)):
                continue
            if used not in number:
                visit(used)
            if used in stack:
                low[name] = min(low[name], low[used])
        if low[name] == number[name]:
            circle = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(circle) > 1:
                found.append(circle)

    for name in GRAPH:
        if name not in number:
            visit(name)
    return found


def test_no_circle():
    assert circles() == []


def test_the_root_holds_the_composition_and_the_command_line():
    assert sorted(path.name for path in HOUSE.glob("*.py")) == ["__init__.py", "__main__.py", "attention.py", "cli.py"]


NAMES = {"auto", "dense", "reference", "cpu", "gpu", "triton"}


def compared_engines(path: Path) -> list[int]:
    """Lines that compare something of the name engine with the name of one."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            named = any("engine" in ast.unparse(side) for side in sides)
            words = {n.value for side in sides for n in ast.walk(side) if isinstance(n, ast.Constant)}
            if named and words & NAMES:
                lines.append(node.lineno)
    return lines


def test_nobody_but_the_engines_compares_engines():
    found = {name: compared_engines(path) for name, path in MODULES.items() if room(name) != "engines"}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_no_file_is_too_long():
    assert [str(path) for path in HOUSE.rglob("*.py") if len(path.read_text(encoding="utf-8").splitlines()) > 500] == []


# ---- a new part is one file, here a class of this test, and one line


class Toy(Engine):
    """Keeps what the reference keeps, and says so."""

    name = "toy"

    def why_not(self, parts: Parts, request: Request) -> list[str]:
        return [] if request.tokens == 1 else ["it takes one query at a time", "and it is a toy"]

    def prepare(self, parts: Parts, request: Request) -> PreparedStep:
        return Reference().prepare(parts, request)

    def rows(self, parts: Parts, request: Request) -> list[PlanRow]:
        return [PlanRow("select", "a toy")]

    def crossover(self, parts: Parts, request: Request) -> int:
        return 100


def test_an_engine_is_one_file_and_one_line(monkeypatch):
    monkeypatch.setattr(choose, "ENGINES", (Toy(), *choose.ENGINES))
    attn = HashAttention(SimHash(64, centring=None), FlatHamming(), TopK(k=5), engine="toy")
    cache = attn.new_cache(1, 2, 16)
    cache.append(torch.randn(1, 2, 120, 16), torch.randn(1, 2, 120, 16))
    q = torch.randn(1, 4, 1, 16)
    _, selection = attn.run(q, cache)
    _, expected = attn.replace(engine="reference").run(q, cache)
    assert torch.equal(selection.ids, expected.ids)
    with pytest.raises(ValueError, match="one query at a time; and it is a toy"):
        attn.run(q.expand(-1, -1, 2, -1), cache)
    auto = attn.replace(engine="auto")
    sizes = {"q_heads": 4, "kv_heads": 2, "head_dim": 16}
    assert [auto.explain(**sizes, keys=keys).engine for keys in (99, 100)] == ["dense", "toy"]
    assert "a toy" in str(attn.explain(**sizes, keys=7))
    assert auto.choice(q, cache).why(auto.parts) == ("toy", "auto, faster from 100 keys on")


@dataclass(frozen=True)
class OtherScores(FlatHamming):
    """Scores of a family of its own."""

    scores = "other"


class OtherKernels(Specification):
    """Kernels of that family, anywhere."""

    def why_not(self, request: decode.KernelRequest) -> list[str]:
        return [] if request.scores == "other" else ["they serve other scores"]

    def decode(self, like: decode.Inputs) -> Decode:
        steps.append(like.scores)
        return super().decode(like)


steps: list[str] = []


def test_a_family_of_scores_on_a_gpu_is_one_file_and_one_line(monkeypatch):
    monkeypatch.setattr(decode, "KERNELS", (*decode.KERNELS, OtherKernels()))
    attn = HashAttention(SimHash(64, centring=None), OtherScores(), TopK(k=5), engine="gpu")
    q, k = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 40, 64)
    steps.clear()
    found = attn(q, k, k)
    assert steps == ["other"]
    assert torch.allclose(found, attn.replace(engine="reference")(q, k, k), atol=1e-5)
    with pytest.raises(ValueError, match="they serve other scores"):
        attn.replace(index=FlatHamming())(q, k, k)


def test_a_step_is_made_ready_once_and_let_go_when_the_memory_moves(monkeypatch):
    monkeypatch.setattr(decode, "KERNELS", (*decode.KERNELS, OtherKernels()))
    attn = HashAttention(SimHash(64, centring=None), OtherScores(), TopK(k=5), engine="gpu")
    cache, plain = attn.new_cache(1, 2, 64), attn.replace(engine="reference")
    steps.clear()
    for keys, tokens, made, kept in ((40, 1, 1, 1), (1, 1, 1, 1), (1, 2, 2, 2), (900, 1, 3, 1), (1, 1, 3, 1)):
        cache.append(torch.randn(1, 2, keys, 64), torch.randn(1, 2, keys, 64))
        q = torch.randn(1, 4, tokens, 64)
        assert torch.allclose(attn(q, cache), plain(q, cache), atol=1e-5)
        assert (len(steps), len(cache.on_device.prepared)) == (made, kept)


class Signs(Encoder):
    """The signs of a key's numbers."""

    bits = 64

    def encode_key(self, k: torch.Tensor, centre: torch.Tensor | None = None) -> torch.Tensor:
        return key_bits(k.float())

    def encode_query(self, q: torch.Tensor) -> torch.Tensor:
        return key_bits(q.float())


def test_an_encoder_is_one_file():
    attn = HashAttention(Signs(), FlatHamming(), TopK(k=5))
    q, k = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 40, 64)
    found = {engine: attn.replace(engine=engine)(q, k, k) for engine in ("reference", "cpu")}
    assert torch.allclose(*found.values(), atol=1e-5)
    assert attn.explain(q_heads=4, kv_heads=2, head_dim=64, keys=40).code_bytes == 2 * 40 * 8
    served = attn.replace(engine="gpu").explain(q_heads=4, kv_heads=2, head_dim=64, keys=40, device="cuda")
    assert served.engine == "gpu"


@dataclass(frozen=True)
class Every(Selector):
    """Keeps each `step`-th key, from the last one back."""

    step: int = 2
    ranked = False

    def budget(self, visible: int, forced: int = 0) -> int:
        return -(-visible // self.step)

    def select(self, view: View, step: Step) -> Selection:
        columns = view.visible[..., 1:] - 1 - self.step * torch.arange(self.budget(view.longest))  # [B, T, K]
        ids = columns.masked_fill(columns < view.visible[..., :1], -1).to(torch.int32)
        return Selection(ids.unsqueeze(1).expand(-1, view.kv_heads, -1, -1).contiguous())


def test_a_selector_is_one_file():
    attn = HashAttention(selector=Every(3), engine="reference")
    q, k = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 40, 64)
    dense = attn.replace(selector=None, attend=DenseAttend())
    assert torch.allclose(attn(q, k, k), dense(q, k[:, :, 0::3], k[:, :, 0::3]), atol=1e-5)


class Pieces(KVStore):
    """Keys and values as they came, a piece an append: nothing of it is in one piece of memory."""

    def __init__(self) -> None:
        self.pieces: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __len__(self) -> int:
        return sum(k.shape[2] for k, _ in self.pieces)

    @property
    def kind(self) -> tuple[torch.dtype, torch.device] | None:
        return (self.pieces[0][0].dtype, self.pieces[0][0].device) if self.pieces else None

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for piece in self.pieces for x in piece)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.pieces.append((k.clone(), v.clone()))

    def rows(self, what: str, ids: torch.Tensor) -> torch.Tensor:
        held = self.whole(what).repeat_interleave(ids.shape[1] // self.pieces[0][0].shape[1], 1)
        columns = ids.clamp(min=0).long().flatten(2).unsqueeze(-1).expand(-1, -1, -1, held.shape[3])
        return held.gather(2, columns).view(*ids.shape, -1)

    def dense_chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield from self.pieces

    def truncate(self, length: int) -> None:
        self.pieces = [(self.whole("keys")[:, :, :length], self.whole("values")[:, :, :length])]

    def select_rows(self, rows: torch.Tensor) -> None:
        self.pieces = [(k[rows], v[rows]) for k, v in self.pieces]

    def clear_before(self, row: int, column: int) -> None:
        for x in self.pieces[0]:
            x[row, :, :column] = 0


@pytest.mark.parametrize("engine", ["reference", "cpu", "dense"])
@pytest.mark.parametrize(
    ("selector", "attend"),
    [
        (Sink(2) | Recent(4) | TopK(k=20, per="kv_head"), ExactAttend()),
        (Tiers(0.1, 0.3), MixedPrecision()),
        (Refine(TopK(k=9), 3), ExactAttend()),
        (RandomTail(TopK(k=9), k=12), SampledAttend(errors=True)),
    ],
    ids=["exact", "tiers", "refined", "sampled"],
)
def test_a_store_is_one_file(selector, attend, engine):
    attn = HashAttention(SimHash(64, centring=Centring(keys=40)), FlatHamming(), selector, attend, engine=engine)
    made = {"encoder": attn.encoder, "index": attn.index, "norms": attend.needs_norms}
    caches = [KVCache(2, 2, 16, **made, store=store) for store in (None, Pieces())]
    k, v = torch.randn(2, 2, 130, 16), torch.randn(2, 2, 130, 16)
    for tokens in (3, 1):
        q = torch.randn(2, 4, tokens, 16)
        for cache in caches:
            cache.append(k[:, :, :120], v[:, :, :120], start=torch.tensor([0, 30]) if len(cache) == 0 else None)
            cache.append(k[:, :, 120:], v[:, :, 120:])
        outs = []
        for cache in caches:
            torch.manual_seed(0)
            outs.append(attn.run(q, cache)[0].out)
            cache.crop(100)
            cache.select_rows(torch.tensor([1, 0]))
        assert torch.allclose(*outs, atol=1e-5)
