"""Private names of other libraries: each is in CONTRIBUTING.md's table, and still there.

A private name may go with any new version of its library. Then a test here fails and says which,
where it is used and what for. A use that the table does not list fails as well, and so does an
access to a private name of ours from another module.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "slap_stream"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
ROW = re.compile(r"\| `(?P<name>[\w.]+)` \| (?P<where>[^|]+) \| (?P<why>[^|]+) \|")
# Stubs that only type checkers see, so that mypy says when they change; and what versions of
# `datasets` before the installed one wrote into files that are still about; and a folder of ours.
NOT_OF_A_LIBRARY = {"_typeshed", "_indices_data_files", "_slap_corpus", "_slap_log"}
# Libraries that files are for, and that not everybody installs.
EXTRAS = {"trl"}
PRIVATE = re.compile(r"_(?!_)\w+")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a dotted name, the files that use it, and what for."""

    name: str
    where: tuple[str, ...]
    why: str

    @property
    def last(self) -> str:
        """The name without what it is a name of."""
        return self.name.rpartition(".")[2]

    @property
    def is_due(self) -> bool:
        """Whether the installed version is as new as the name is."""
        since = re.match(r"since (\S+):", self.why)
        library = self.name.partition(".")[0]
        return since is None or Version(version(library)) >= Version(since[1])


def table() -> list[Row]:
    """The table of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return [
        Row(found["name"], tuple(re.findall(r"`([^`]+)`", found["where"])), found["why"].strip())
        for found in ROW.finditer(text)
    ]


def is_private(name: str) -> bool:
    """Whether a name begins with one underscore."""
    return PRIVATE.fullmatch(name) is not None


def defined_in(tree: ast.AST) -> set[str]:
    """Names that some code makes: variables, functions, classes, slots and attributes of `self`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                found.add(node.attr)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__slots__":
            found.update(ast.literal_eval(node.value))
    return found


def mentioned_in(source: str) -> set[str]:
    """All names in some code, also as strings; not in comments."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        for field in ("id", "attr", "name", "value"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                found.add(value)
    return found


def foreign_names(source: str) -> set[str]:
    """Private names in a source text that it does not make itself.

    Imports of them or from private modules, attributes of whatever object, and whole strings, which
    `getattr` and its like may be given.
    """
    tree = ast.parse(source)
    own = defined_in(tree)
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            for alias in node.names:
                names = [*module.split("."), *alias.name.split(".")]
                found.update(name for name in names if is_private(name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            found.update({node.attr} - own)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.update({node.value} - own if is_private(node.value) else ())
    return found - NOT_OF_A_LIBRARY


def silent_lookups(source: str) -> list[str]:
    """`getattr` of private names with a default: what it guards is off when the name is gone."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr"
        if len(node.args) == 3 and is_private(ast.unparse(node.args[1])[1:-1])
    ]


@cache
def private_names_of(kind: type) -> frozenset[str]:
    """Private attributes that a class itself makes."""
    try:
        found = defined_in(ast.parse(textwrap.dedent(inspect.getsource(kind))))
    except (TypeError, OSError):
        found = set(vars(kind))  # not written in Python
    return frozenset(filter(is_private, found))


def classes_of(module: Any) -> list[type]:
    """Classes that a module defines."""
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type)]
    return [kind for kind in kinds if kind.__module__ == module.__name__]


def bases_of(module: Any, *, ours: bool) -> set[type]:
    """Classes that a module's classes inherit from, in this package or from other libraries."""
    return {
        base
        for kind in classes_of(module)
        for base in kind.__mro__
        if base.__module__ not in ("builtins", "typing", module.__name__)
        if base.__module__.startswith("slap_stream.") == ours
    }


def inherited_names(module: Any) -> set[str]:
    """Private names of other libraries' classes that classes of a module use as their own."""
    used = {name for kind in classes_of(module) for name in mentioned_in(inspect.getsource(kind))}
    return used & set().union(*map(private_names_of, bases_of(module, ours=False)))


@pytest.mark.parametrize("file", FILES)
def test_every_private_name_that_a_file_uses_is_in_the_table(file: str) -> None:
    dotted = "slap_stream." + file.removesuffix(".py").replace("/", ".")
    try:
        module = import_module(dotted.removesuffix(".__init__"))
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        pytest.skip(f"{error.name} is an extra")
    # What a base class of ours keeps is a subclass's, too.
    kept = set().union(*map(private_names_of, bases_of(module, ours=True)))
    used = (foreign_names((PACKAGE / file).read_text()) - kept) | inherited_names(module)
    listed = {row.last for row in table() if file in row.where and row.is_due}
    assert sorted(used) == sorted(listed), "uses differ from CONTRIBUTING.md's table"


@pytest.mark.parametrize("file", FILES)
def test_no_private_name_is_looked_up_with_a_default(file: str) -> None:
    assert silent_lookups((PACKAGE / file).read_text()) == []


@pytest.mark.parametrize("row", table(), ids=lambda row: row.name)
def test_what_a_row_names_is_still_there(row: Row) -> None:
    assert all(file in FILES for file in row.where), row.where
    if not row.is_due:
        assert not is_there(row.name), f"{row.name} is older than the table says"
        return
    assert is_there(row.name), (
        f"{row.name} is gone from the installed version; {', '.join(row.where)} used it: {row.why}"
    )


def is_there(name: str) -> bool:
    """Whether a module has a name, or the source of a class or function mentions it."""
    path, _, last = name.rpartition(".")
    owner = resolve(path)
    return hasattr(owner, last) or (
        not inspect.ismodule(owner) and last in mentioned_in(inspect.getsource(owner))
    )


def resolve(path: str) -> Any:
    """What a dotted path means: a module, or something in one."""
    try:
        return import_module(path)
    except ModuleNotFoundError:
        parent, _, last = path.rpartition(".")
        if not parent:
            raise
        return getattr(resolve(parent), last)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from torch.x import _y", {"_y"}),
        ("from torch._x import y", {"_x"}),
        ("import torch._x.y", {"_x"}),
        ("a._x", {"_x"}),
        ("a._x.b._y = 1", {"_x", "_y"}),
        ("getattr(a, '_x', None)", {"_x"}),
        ("vars(a).pop('_x')", {"_x"}),
        ("self._x", {"_x"}),
        ("self._x = 1; other._x", set()),
        ("def _f(): ...\nm._f", set()),
        ("a.__dict__", set()),
        ("'a string with _x'", set()),
    ],
)
def test_the_search_finds_private_names(source: str, names: set[str]) -> None:
    assert foreign_names(source) == names


def test_the_search_finds_what_is_used_as_ones_own() -> None:
    loader = import_module("slap_stream.loader.loader")
    assert "_iterator" in inherited_names(loader)


def test_the_search_finds_silent_lookups() -> None:
    assert silent_lookups("getattr(a, '_x', ())") == ["getattr(a, '_x', ())"]
    assert silent_lookups("getattr(a, '_x'); getattr(a, 'x', None)") == []


def test_a_name_that_is_gone_is_missed() -> None:
    assert is_there("torch.utils.data.DataLoader._iterator")
    assert not is_there("torch.utils.data.DataLoader._iterators")
    assert not is_there("torch.utils.data._dataloader")
