"""The lists of a current stack hold all that pyproject.toml asks for, but for streaming itself."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Where a current stack begins: what streaming's metadata keeps out.
NEWER = {"numpy": "2.2", "transformers": "5"}


def listed(file: str) -> dict[str, SpecifierSet]:
    """Requirements of a file of this folder and of those that it includes, by name."""
    found: dict[str, SpecifierSet] = {}
    for line in (ROOT / "requirements" / file).read_text().splitlines():
        wanted = line.partition("#")[0].strip()
        if wanted.startswith("-r "):
            found |= listed(wanted.removeprefix("-r "))
        elif wanted:
            requirement = Requirement(wanted)
            found[requirement.name] = requirement.specifier
    return found


def asked_for(*extras: str) -> dict[str, SpecifierSet]:
    """What the project asks for, with these extras and those that they include."""
    wanted = [*PROJECT["dependencies"]]
    for extra in extras:
        wanted += PROJECT["optional-dependencies"][extra]
    found: dict[str, SpecifierSet] = {}
    for requirement in map(Requirement, wanted):
        if requirement.name == PROJECT["name"]:
            found |= asked_for(*requirement.extras)
        else:
            found[requirement.name] = requirement.specifier
    return found


@pytest.mark.parametrize(
    ("file", "extras"), [("current.txt", ("trainer",)), ("current-dev.txt", ("dev", "remote"))]
)
def test_a_current_stack_has_what_the_project_asks_for(file: str, extras: tuple[str, ...]) -> None:
    have, want = listed(file), asked_for(*extras)
    assert "mosaicml-streaming" in want
    assert "mosaicml-streaming" not in have, "its metadata would bring the old stack back"
    assert sorted(want.keys() - have.keys()) == ["mosaicml-streaming"]
    for name, specifier in want.items():
        if name not in (*NEWER, "mosaicml-streaming"):
            assert have[name] == specifier, name
    for name, least in NEWER.items():
        assert have[name] == SpecifierSet(f">={least}")
