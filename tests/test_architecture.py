"""The floors of the design, read from the imports; and what importing the package must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "slap_stream"

# A folder stands where the module does that it is a part of.
FLOORS = {
    0: "config errors types",
    1: "background choosing interrupts kernels linear rng chat shard_index sorting state_bytes",
    2: "order strata plan quota repeats reservoir moments learnability appraisal evidence feedback "
    "intake judge policies embeddings encoders encoding corpus converting",
    3: "composer lane lane_counts lane_feedback lane_questions lane_statistics pending refreshes "
    "run_state sampler shared",
    4: "distributed loader loader_checks loader_state probe probing progress shards sharding "
    "workers",
    5: "integrations",
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names.split()}
ONLY_IMPORTER = {"numba": "kernels", "zarr": "embeddings", "streaming": "shards"}


def imports_of(source: str) -> set[str]:
    """Modules that a source text imports, anywhere in it, by dotted name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def modules() -> dict[str, str]:
    """Top-level module or subpackage of each source file, with its source."""
    return {
        str(path.relative_to(PACKAGE)): path.read_text()
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "__init__.py" or path.parent != PACKAGE
    }


def violations(sources: dict[str, str]) -> list[str]:
    """Imports that go up a floor, and imports of a library outside its only importer."""
    wrong = []
    for file, source in sources.items():
        name = Path(file).parts[0].removesuffix(".py")
        if name not in FLOOR_OF:
            wrong.append(f"{file} stands on no floor")
            continue
        for imported in imports_of(source):
            top, _, rest = imported.partition(".")
            other = rest.partition(".")[0]
            if top == "slap_stream" and FLOOR_OF.get(other, -1) > FLOOR_OF[name]:
                wrong.append(f"{file} imports {other}, a floor above it")
            if top in ONLY_IMPORTER and ONLY_IMPORTER[top] != name:
                wrong.append(f"{file} imports {top}; only {ONLY_IMPORTER[top]} may")
    return wrong


def test_modules_import_only_from_their_own_floor_and_below() -> None:
    assert violations(modules()) == []


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("order.py", "from slap_stream.sampler import SlapSampler", "a floor above"),
        ("lane.py", "def f():\n    import slap_stream.loader", "a floor above"),
        ("loader.py", "import slap_stream.integrations.transformers", "a floor above"),
        ("quota.py", "import numba", "only kernels may"),
        ("tidy.py", "", "stands on no floor"),
    ],
)
def test_the_floor_check_can_fail(file: str, source: str, complaint: str) -> None:
    found = violations({file: source})
    assert found
    assert all(complaint in message for message in found)


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, slap_stream; slap_stream.SlapConfig(); dir(slap_stream);"
        "print([m for m in ('torch', 'streaming', 'zarr', 'numba', 'transformers') "
        "if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"


def test_public_names_are_those_of_the_design() -> None:
    import slap_stream

    for name in slap_stream.__all__:
        assert getattr(slap_stream, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'SlapLoader'"):
        _ = slap_stream.SlapLoader
