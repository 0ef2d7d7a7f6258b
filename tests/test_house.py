"""The rules of the house: imports point down, no import circle, method names stay in methods/, nothing hostile runs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from hf_neuronselect.methods import METHODS

ROOT = "hf_neuronselect"
PACKAGE = Path(__file__).parent.parent / ROOT
# From the bottom up; a module may import from its own floor and from those below it.
FLOORS = [
    {"core"},
    {"rows"},
    {"models"},
    {"signals"},
    {"store", "pickers"},
    {"methods"},
    {"hub"},
    {"explain"},
    {"selection"},
    {"export", "training", "metrics"},
    {"pipelines"},
    {"cli"},
]
MAX_LINES = 450
# Methods that carry the name of the signal they read, or of its engine; signals/ defines those names.
SIGNAL_NAMES = {"mona", "nait", "polysemantic", "hidden", "routing", "encoder", "bidirectional", "llm2vec"}
# Where such a string may be: the default method, the tables of the bundled demo, a value of TRL's.
NAMED_METHODS = {
    "core.configs": {"mona"},
    "training.config": {"random"},
    "selection.doubts": {"longest", "shortest"},  # the control that a warning names
    # The option and the record's field of this name; half of an SAE.
    "training.topk": {"encoder"},
    "models.encoders": {"encoder"},
    "core.provenance": {"encoder"},
    "pipelines.app_page": {"hidden"},  # a value of Gradio's
    # The controls of every comparison.
    "pipelines.comparison": {"random"},
    "pipelines.compare_train": {"random", "longest", "matched-random"},
    "pipelines.trained": {"random"},
    "pipelines.demo": {"mona", "nait", "nait-contrast", "polysemantic", "hidden", "longest", "random"},
}
# Imports inside functions that may close a circle, with the reason.
LAZY = {
    ("selection.selection", "selection.selector"),  # a saved selection gives its selector back
}
# Today's exceptions, one list a rule. An entry whose fault is gone fails the last test: delete it.
KNOWN: dict[str, set[tuple[str, ...]]] = {
    "floors": set(),
    "circles": set(),
    "methods": set(),
    "lines": set(),
}
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "click"}
FORBIDDEN_CALLS = {"print", "eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load", "torch.load"}
FORBIDDEN_ARGUMENTS = {("trust_remote_code", True), ("allow_pickle", True), ("weights_only", False)}


def name_of(path: Path) -> str:
    """``core/errors.py`` -> ``core.errors``; a folder's ``__init__`` is the folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = [name for name in FILES if name]  # the root's own __init__ may import everything
each_module = pytest.mark.parametrize("module", MODULES)


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def nodes_of(tree: ast.AST, *, for_types: bool) -> Iterator[ast.AST]:
    """Every node, at any depth; ``for_types=False`` leaves out what follows ``if TYPE_CHECKING:``."""
    for node in ast.iter_child_nodes(tree):
        if not for_types and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from nodes_of(node, for_types=for_types)


def imports_of(tree: ast.AST, module: str, is_folder: bool, *, for_types: bool = True) -> Iterator[str]:
    """Every module of the package that is imported, absolutely or relatively, also inside functions."""
    package = [ROOT, *module.split(".")]
    package = package if is_folder else package[:-1]
    for node in nodes_of(tree, for_types=for_types):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from known(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                if alias.name != "__version__":  # the root's only own value
                    yield from known(f"{source}.{alias.name}")


def known(dotted: str) -> Iterator[str]:
    """The longest part of a dotted name that is a module of the package; ``""`` is the package itself."""
    if dotted != ROOT and not dotted.startswith(f"{ROOT}."):
        return
    parts = dotted.split(".")[1:]
    yield next(".".join(parts[:n]) for n in range(len(parts), -1, -1) if ".".join(parts[:n]) in FILES)


@cache
def graph(*, for_types: bool) -> dict[str, set[str]]:
    return {
        module: set(imports_of(tree_of(module), module, FILES[module].stem == "__init__", for_types=for_types))
        - {module}
        for module in MODULES
    }


def floor(module: str) -> int:
    folder = module.split(".")[0]
    return next(i for i, folders in enumerate(FLOORS) if folder in folders)


# ----------------------------------------------------------------------------------------- imports
def arrows_up() -> set[tuple[str, ...]]:
    """Imports of a module on a higher floor, or of the package's root."""
    return {
        (module, imported)
        for module, targets in graph(for_types=True).items()
        for imported in targets
        if not imported or floor(imported) > floor(module)
    }


def circles() -> set[tuple[str, ...]]:
    """Groups of modules that import each other when they run, directly or through others."""
    imports = graph(for_types=False)
    edges = {module: {t for t in targets if t and (module, t) not in LAZY} for module, targets in imports.items()}

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = edges[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    below = {module: reached(module) for module in edges}
    return {
        tuple(sorted(other for other in below[module] if module in below[other]))
        for module in edges
        if module in below[module]
    }


def test_imports_point_down() -> None:
    assert not arrows_up() - KNOWN["floors"]


def test_no_import_circle() -> None:
    assert not circles() - KNOWN["circles"]


def test_imports_for_types_alone_make_no_circle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.FILES", dict.fromkeys(["", "one.a", "one.b"], PACKAGE))
    tree = ast.parse("if TYPE_CHECKING:\n    from .b import X")
    assert set(imports_of(tree, "one.a", is_folder=False, for_types=True)) == {"one.b"}
    assert set(imports_of(tree, "one.a", is_folder=False, for_types=False)) == set()


def test_lazy_imports_are_inside_functions() -> None:
    for module, imported in LAZY:
        at_start = ast.Module([n for n in tree_of(module).body if isinstance(n, ast.Import | ast.ImportFrom)], [])
        assert imported not in imports_of(at_start, module, FILES[module].stem == "__init__")


@pytest.mark.parametrize(
    ("code", "imported"),
    [
        ("from . import b", {"one.b"}),
        ("from .b import x", {"one.b"}),
        ("from ..two import x", {"two"}),
        ("from ..two import c", {"two.c"}),
        ("from .. import two", {"two"}),
        ("from hf_neuronselect.two.c import x", {"two.c"}),
        ("import hf_neuronselect.two.c as c", {"two.c"}),
        ("import hf_neuronselect", {""}),
        ("from hf_neuronselect import Selection", {""}),
        ("def f():\n    from ..two.c import x", {"two.c"}),
        ("if TYPE_CHECKING:\n    from ..two.c import X", {"two.c"}),
        ("import hf_neuronselector, numpy", set()),
        ("from .. import __version__", set()),
    ],
)
def test_every_kind_of_import_is_seen(code: str, imported: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.FILES", dict.fromkeys(["", "one", "one.a", "one.b", "two", "two.c"], PACKAGE))
    assert set(imports_of(ast.parse(code), "one.a", is_folder=False)) == imported


def test_no_loose_modules() -> None:
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert files == {"__init__.py", "py.typed"}
    folders = {path.name for path in PACKAGE.iterdir() if any(path.rglob("*.py"))} - {"__pycache__"}
    assert folders == set.union(*FLOORS)


# ----------------------------------------------------------------------------------------- content
def method_names() -> set[str]:
    return {name for name in METHODS.names() if METHODS[name].__module__.startswith(f"{ROOT}.methods.")}


def named_methods() -> set[tuple[str, ...]]:
    """(module, method) of every string outside methods/ that is a method's name."""
    names = method_names()
    return {
        (module, node.value)
        for module in MODULES
        if (folder := module.split(".")[0]) != "methods"
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
        if not (folder == "signals" and node.value in SIGNAL_NAMES)
        if node.value not in NAMED_METHODS.get(module, ())
    }


def test_method_names_stay_in_their_files() -> None:
    assert {"mona", "random", "longest"} <= method_names()
    assert not named_methods() - KNOWN["methods"]


def long_files() -> set[tuple[str, ...]]:
    return {(module,) for module in MODULES if len(FILES[module].read_text().splitlines()) > MAX_LINES}


def test_files_are_short() -> None:
    assert not long_files() - KNOWN["lines"]


@each_module
def test_nothing_hostile_runs_and_nothing_is_printed(module: str) -> None:
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_MODULES
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert (node.module or "").split(".")[0] not in FORBIDDEN_MODULES
        elif isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS
            for keyword in node.keywords:
                if isinstance(keyword.value, ast.Constant):
                    assert (keyword.arg, keyword.value.value) not in FORBIDDEN_ARGUMENTS


def test_known_exceptions_still_occur() -> None:
    """An exception that is gone must leave the list."""
    now = {"floors": arrows_up(), "circles": circles(), "methods": named_methods(), "lines": long_files()}
    assert {rule: KNOWN[rule] - found for rule, found in now.items()} == {rule: set() for rule in now}
