"""The recipes of docs/trainers.md run as they stand."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.test_training import folder  # noqa: F401  (a fixture)

PAGE = (Path(__file__).parent.parent / "docs" / "trainers.md").read_text()
RECIPES = {"Accelerate": "accelerate", "Lightning": "lightning"}


def recipe(heading: str) -> str:
    """The Python block of a section."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert section is not None
    [block] = re.findall(r"```python\n(.*?)```", section[1], flags=re.DOTALL)
    return block


@pytest.mark.parametrize("heading", RECIPES)
# Lightning warns of much that is meant so (few workers, a short epoch), and of its own ways.
@pytest.mark.filterwarnings("ignore")
def test_a_recipe_runs(
    heading: str,
    tmp_path: Path,
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip(RECIPES[heading])
    shutil.copytree(folder, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    scope: dict[str, Any] = {}
    exec(compile(recipe(heading), "docs/trainers.md", "exec"), scope)
    loader = scope["loader"] if "loader" in scope else scope["trainer"].train_dataloader
    assert loader.epochs_done == 2
    assert loader.metrics()["probe_steps"] > 0
