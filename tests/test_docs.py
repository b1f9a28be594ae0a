"""The pages of docs/ run as they stand, and the site has all of them."""

from __future__ import annotations

import ast
import gzip
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest

import slap_stream
from tests.test_readme import PARSERS, blocks
from tests.test_training import folder  # noqa: F401  (a fixture)

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {path.name: path.read_text() for path in sorted(DOCS.glob("*.md"))}
RECIPES = {"Accelerate": "accelerate", "Lightning": "lightning"}
# Whose blocks each have a test of their own: below, in test_readme.py, in tests/integrations and in
# tests/selection. All blocks of any other page run here, one after the other.
ONE_BY_ONE = {"trainers.md": 3, "padding.md": 1, "selection.md": 1}
WHOLE = [name for name, page in PAGES.items() if blocks("python", page) and name not in ONE_BY_ONE]


def recipe(heading: str) -> str:
    """The Python block of a section."""
    section = re.search(
        rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGES["trainers.md"], flags=re.DOTALL | re.MULTILINE
    )
    assert section is not None
    [block] = blocks("python", section[1])
    return block


@pytest.fixture
def here(
    tmp_path: Path,
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """What the pages speak of, as the working directory: `corpus`, `model`, `chats.jsonl.gz`."""
    shutil.copytree(folder, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    with gzip.open("chats.jsonl.gz", "wt") as file:
        for n in range(100):
            file.write(f'{{"prompt": "question {n}", "completion": "answer {n}"}}\n')
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "here"


@pytest.mark.parametrize("heading", RECIPES)
# Lightning warns of much that is meant so (few workers, a short epoch), and of its own ways.
@pytest.mark.filterwarnings("ignore")
def test_a_recipe_runs(heading: str, here: Path) -> None:
    pytest.importorskip(RECIPES[heading])
    scope: dict[str, Any] = {}
    exec(compile(recipe(heading), "docs/trainers.md", "exec"), scope)
    loader = scope["loader"] if "loader" in scope else scope["trainer"].train_dataloader
    assert loader.epochs_done == 2
    assert loader.metrics()["probe_steps"] > 0


@pytest.mark.parametrize("page", WHOLE)
def test_a_page_runs(page: str, here: Path) -> None:
    scope: dict[str, Any] = {}
    for block in blocks("python", PAGES[page]):
        exec(compile(block, f"docs/{page}", "exec"), scope)


def test_no_block_is_left_out() -> None:
    assert {"index.md", "loop.md", "checkpoints.md"} <= set(WHOLE)
    for page, count in ONE_BY_ONE.items():
        assert len(blocks("python", PAGES[page])) == count, f"{page}: name who runs the new block"


@pytest.mark.parametrize("page", PAGES)
def test_what_cannot_run_here_is_python_all_the_same(page: str) -> None:
    for block in blocks("py", PAGES[page]):
        ast.parse(block)


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page: str) -> None:
    lines = re.findall(r"^(?:    )?(slap-(?:convert|embed|report) .*)$", PAGES[page], re.MULTILINE)
    for line in lines:
        name, *arguments = shlex.split(line, comments=True)
        PARSERS[name]().parse_args(arguments)


def test_the_site_has_every_page() -> None:
    def pages(nav: list[dict[str, Any]]) -> list[str]:
        values = [value for entry in nav for value in entry.values()]
        nested = [pages(value) if isinstance(value, list) else [value] for value in values]
        return [page for found in nested for page in found]

    site = tomllib.loads((DOCS / "zensical.toml").read_text())["project"]
    assert sorted(pages(site["nav"])) == sorted(PAGES)


def test_the_reference_has_all_that_is_exported() -> None:
    named = re.findall(r"^::: slap_stream\.(\w+)$", PAGES["api.md"], re.MULTILINE)
    assert sorted(named) == sorted([*slap_stream.__all__, "errors"])


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## (\S+)$", PAGES["changelog.md"], re.MULTILINE)
    assert versions[0] == slap_stream.__version__
