"""The house: which folder may use which, and what importing the package must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "slap_stream"

# A folder imports from those before it. Modules outside folders, which all may import, come first.
TOP = ("config", "errors", "types")
FOLDERS = (
    "core",
    "remote",
    "text",
    "shards",
    "corpus",
    "embeddings",
    "selection",
    "probe",
    "loader",
    "report",
    "integrations",
    "cli",
)
ONLY_IMPORTER = {
    "numba": "core/kernels.py",
    "zarr": "embeddings/store.py",
    "streaming": "shards/library.py",
    "obstore": "remote/bucket.py",
    "fsspec": "remote/bucket.py",
    "boto3": "remote/bucket.py",
}
MOST_LINES = 450
# What not everybody installs, and the modules that are for it.
EXTRAS = {"trl": "integrations/trl.py"}


def imports_of(source: str) -> set[tuple[str, str]]:
    """What a source text imports, anywhere in it: dotted module, and name in it or ""."""
    found: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update((node.module, alias.name) for alias in node.names)
    return found


def sources() -> dict[str, str]:
    """Each source file of the package, by its path in it."""
    return {
        path.relative_to(PACKAGE).as_posix(): path.read_text()
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def exports_of(folder: str) -> dict[str, tuple[str, ...]]:
    """What a folder says that others may import, by module."""
    exports: dict[str, tuple[str, ...]] = import_module(f"slap_stream.{folder}").EXPORTS
    return exports


def violations(files: dict[str, str]) -> list[str]:
    """Imports against the flow, of what a folder does not export, or of a library elsewhere."""
    wrong = []
    for file, source in files.items():
        *folders, name = file.split("/")
        here = folders[0] if folders else ""
        if (here not in FOLDERS) if here else name.removesuffix(".py") not in (*TOP, "__init__"):
            wrong.append(f"{file} stands in no folder of the flow")
            continue
        if len(source.splitlines()) > MOST_LINES:
            wrong.append(f"{file} has more than {MOST_LINES} lines")
        for module, imported in imports_of(source):
            top, _, inner = module.partition(".")
            if top in ONLY_IMPORTER and file != ONLY_IMPORTER[top]:
                wrong.append(f"{file} imports {top}; only {ONLY_IMPORTER[top]} may")
            there, _, rest = inner.partition(".")
            if top != "slap_stream" or there == here or there not in FOLDERS:
                continue
            if not here:
                if name != "__init__.py":
                    wrong.append(f"{file} imports {there}; all folders may import {name}")
            elif FOLDERS.index(there) > FOLDERS.index(here):
                wrong.append(f"{file} imports {there}, which comes after {here}")
            elif imported not in exports_of(there).get(rest, ()):
                wrong.append(f"{file} imports {rest}.{imported}, which {there} does not export")
    return wrong


def cycles(files: dict[str, str]) -> list[str]:
    """Modules that import each other, through however many others."""
    modules = {
        "slap_stream." + file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file
        for file in files
    }
    uses = {
        module: {
            other
            for imported, name in imports_of(files[file])
            for other in (imported, f"{imported}.{name}")
            if other in modules and other != module
        }
        for module, file in modules.items()
    }
    reached: dict[str, set[str]] = {}

    def reach(module: str) -> set[str]:
        if module not in reached:
            reached[module] = set()
            waiting = list(uses[module])
            while waiting:
                other = waiting.pop()
                if other not in reached[module]:
                    reached[module].add(other)
                    waiting.extend(uses[other])
        return reached[module]

    return sorted(module for module in modules if module in reach(module))


def test_folders_import_what_earlier_ones_export() -> None:
    assert violations(sources()) == []


def test_no_modules_import_each_other() -> None:
    assert cycles(sources()) == []


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("selection/order.py", "from slap_stream.loader.ranks import Ranks", "comes after"),
        ("selection/lane.py", "def f():\n    import slap_stream.loader.loader", "comes after"),
        ("loader/loader.py", "import slap_stream.integrations.transformers", "comes after"),
        ("loader/loader.py", "from slap_stream.selection.lane import Lane", "does not export"),
        ("config.py", "from slap_stream.core.rng import uniforms", "all folders may import"),
        ("selection/quota.py", "import numba", r"only core/kernels.py may"),
        ("tidy.py", "", "no folder of the flow"),
        ("stuff/tidy.py", "", "no folder of the flow"),
        ("core/long.py", "\n" * 451, "more than 450 lines"),
    ],
)
def test_the_check_of_imports_can_fail(file: str, source: str, complaint: str) -> None:
    found = violations({file: source})
    assert found
    assert all(complaint in message for message in found)


def test_the_check_of_cycles_can_fail() -> None:
    assert cycles(
        {
            "core/a.py": "from slap_stream.core import b",
            "core/b.py": "from slap_stream.core.c import d",
            "core/c.py": "import slap_stream.core.a",
            "core/d.py": "import slap_stream.core.a",
        }
    ) == ["slap_stream.core.a", "slap_stream.core.b", "slap_stream.core.c"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_says_what_it_is_for(folder: str) -> None:
    """Its docstring names every file, and it exports nothing that nobody uses."""
    stage = import_module(f"slap_stream.{folder}")
    files = {p.name for p in (PACKAGE / folder).glob("*.py")} - {"__init__.py"}
    assert [name for name in sorted(files) if name not in stage.__doc__] == []
    used = {
        pair
        for file, source in sources().items()
        if not file.startswith(f"{folder}/")
        for pair in imports_of(source)
    }
    for module, names in exports_of(folder).items():
        dotted = f"slap_stream.{folder}.{module}"
        wanted = [e for e, file in EXTRAS.items() if file == f"{folder}/{module}.py"]
        if not all(map(find_spec, wanted)):
            continue
        for name in names:
            assert hasattr(import_module(dotted), name), f"{dotted} has no {name}"
            assert (dotted, name) in used or folder == "integrations", f"nobody imports {name}"


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("torch", "streaming", "zarr", "numba", "transformers", "pyarrow", "sklearn")
    assert loaded("import slap_stream; slap_stream.SlapConfig(); dir(slap_stream)", heavy) == "[]"


def test_a_sampler_needs_neither_torch_nor_streaming() -> None:
    heavy = ("torch", "streaming", "zarr", "transformers", "pyarrow", "sklearn")
    assert loaded("import slap_stream; slap_stream.SlapSampler", heavy) == "[]"


def test_the_tools_load_nothing_heavy_before_there_is_work() -> None:
    """Nor do processes that only read what is converted: they import the same again."""
    heavy = ("torch", "streaming", "zarr", "numba", "transformers", "pyarrow", "sklearn", "boto3")
    assert loaded("import slap_stream.cli.convert, slap_stream.cli.embed", heavy) == "[]"


def loaded(code: str, modules: tuple[str, ...]) -> str:
    """Which of these modules a process has after running some code."""
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; {code}; print([m for m in {modules} if m in sys.modules])",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return result.stdout.strip()


def test_public_names_are_those_of_the_design() -> None:
    import slap_stream

    for name in slap_stream.__all__:
        assert getattr(slap_stream, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'SlapLoader'"):
        _ = slap_stream.SlapLoader
