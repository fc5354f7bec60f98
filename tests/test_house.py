"""The house: which room may use which, what stands at the root, and in how many places something new is added."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

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


ENGINES = {"auto", "dense", "reference", "cpu", "gpu", "triton"}


def compared_engines(path: Path) -> list[int]:
    """Lines that compare something of the name engine with the name of one."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            named = any("engine" in ast.unparse(side) for side in sides)
            words = {n.value for side in sides for n in ast.walk(side) if isinstance(n, ast.Constant)}
            if named and words & ENGINES:
                lines.append(node.lineno)
    return lines


def test_nobody_but_the_engines_compares_engines():
    found = {name: compared_engines(path) for name, path in MODULES.items() if room(name) != "engines"}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize("path", sorted(HOUSE.rglob("*.py")), ids=lambda path: str(path.relative_to(HOUSE)))
def test_no_file_is_too_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
