"""The package's layers: a module imports only from its own layer and those below it; stages not from each other.

Imports anywhere in a module count, those within functions too; not those under ``if TYPE_CHECKING``. The package's own
``__init__`` is exempt: it is the shelf on which the public names are put out.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(__file__).resolve().parent.parent / "incdump"
ROOT = "incdump"

LAYERS = (
    "errors", "_uapi", "model", "kerndat", "proc", "images", "freeze", "tracking", "classify", "page_pipe", "xfer",
    "holder", "criu",
    "engine", "", "cli", "__main__",
)  # fmt: skip
"""From the bottom up; ``""`` is the package's own ``__init__``."""

STAGES = {"freeze", "tracking", "classify", "page_pipe", "xfer"}


def module_name(package: Path, path: Path) -> str:
    parts = [ROOT, *path.relative_to(package).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(package: Path) -> dict[str, Path]:
    """Every module but the package's own ``__init__``; generated code is left out."""
    paths = [p for p in package.rglob("*.py") if "_pb" not in p.relative_to(package).parts[:-1]]
    return {module_name(package, p): p for p in paths if p != package / "__init__.py"}


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _import_nodes(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and _is_type_checking(child):
            for other in child.orelse:
                yield from _import_nodes(ast.Module([other], []))
        else:
            yield from _import_nodes(child)


def imports(package: Path, path: Path) -> set[str]:
    """The names of all modules of the package that a module imports."""
    known = {*modules(package), ROOT}
    name = module_name(package, path)
    parent = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in _import_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
            continue
        base = node.module or ""
        if node.level:
            above = parent.split(".")[: len(parent.split(".")) - node.level + 1]
            base = ".".join([*above, base] if base else above)
        for alias in node.names:
            full = f"{base}.{alias.name}"
            inner = full in known or any(module.startswith(f"{full}.") for module in known)
            found.add(full if inner else base)
    return {module for module in found if module == ROOT or module.startswith(f"{ROOT}.")} - {name}


def layer(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def violations(package: Path) -> list[str]:
    """Every import that the rules forbid, as a line of text."""
    wrong = []
    for name, path in sorted(modules(package).items()):
        if layer(name) not in LAYERS:
            wrong.append(f"{name}: belongs to no layer")
            continue
        for other in sorted(imports(package, path)):
            if layer(other) not in LAYERS:
                wrong.append(f"{name} imports {other}, which belongs to no layer")
            elif LAYERS.index(layer(other)) > LAYERS.index(layer(name)):
                wrong.append(f"{name} imports {other}, of a higher layer")
            elif layer(name) != layer(other) and {layer(name), layer(other)} <= STAGES:
                wrong.append(f"{name} imports {other}: stages do not import each other")
    return wrong


def cycles(package: Path) -> list[str]:
    """Every module that imports itself by way of others."""
    graph = {name: imports(package, path) for name, path in modules(package).items()}
    wrong = []
    for start in graph:
        seen: set[str] = set()
        todo = list(graph[start])
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += graph.get(name, ())
        if start in seen:
            wrong.append(start)
    return sorted(wrong)


def test_modules_import_only_from_their_own_layer_and_below() -> None:
    assert violations(PACKAGE) == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert cycles(PACKAGE) == []


def make_package(root: Path, **sources: str) -> Path:
    package = root / ROOT
    for name, source in {"__init__": "", **sources}.items():
        path = package / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return package


@pytest.mark.parametrize(
    ("module", "source", "why"),
    [
        ("model.runs", "from incdump.engine import dump", "incdump.engine.dump, of a higher layer"),
        ("model.runs", "import incdump.engine.dump", "incdump.engine.dump, of a higher layer"),
        ("model.runs", "def f():\n    from incdump.engine.dump import run", "of a higher layer"),
        ("model.runs", "from ..engine import dump", "of a higher layer"),
        ("engine.session", "import incdump", "incdump, of a higher layer"),
        ("tracking.holder", "from incdump.freeze import inject", "stages do not import each other"),
        ("misc", "", "belongs to no layer"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, module: str, source: str, why: str) -> None:
    others = {"engine.__init__": "", "engine.dump": "", "freeze.__init__": "", "freeze.inject": ""}
    (found,) = violations(make_package(tmp_path, **{**others, module: source}))
    assert found.startswith(f"{ROOT}.{module}")
    assert why in found


@pytest.mark.parametrize(
    "source",
    [
        "from incdump import errors",
        "from incdump.model.runs import Runs",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from incdump.engine import dump",
        "import numpy",
    ],
)
def test_an_import_from_below_or_for_types_alone_is_allowed(tmp_path: Path, source: str) -> None:
    others = {"errors": "", "model.runs": "", "engine.dump": ""}
    assert violations(make_package(tmp_path, **{**others, "proc.maps": source})) == []


def test_a_cycle_is_found(tmp_path: Path) -> None:
    package = make_package(
        tmp_path,
        **{
            "proc.a": "from incdump.proc.b import x",
            "proc.b": "def f():\n    from incdump.proc import a",
            "proc.c": "import incdump.proc.a",
        },
    )
    assert cycles(package) == ["incdump.proc.a", "incdump.proc.b"]
