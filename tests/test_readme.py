"""The README's Python blocks run as they stand, and its commands are those of the tools."""

from __future__ import annotations

import gzip
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from slap_stream.cli import convert, embed, report
from tests.test_training import folder  # noqa: F401  (a fixture)

README = (Path(__file__).parent.parent / "README.md").read_text()
PARSERS = {
    "slap-convert": convert.parser,
    "slap-embed": embed.parser,
    "slap-report": report.parser,
}


def blocks(language: str, text: str = README) -> list[str]:
    """Code blocks of the README, or another text, in a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_python_blocks_run(
    tmp_path: Path,
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(folder, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    with gzip.open("chats.jsonl.gz", "wt") as file:
        for n in range(100):
            file.write(f'{{"prompt": "question {n}", "completion": "answer {n}"}}\n')
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    found = blocks("python")
    assert found
    scope: dict[str, object] = {}
    for block in found:
        exec(compile(block, "README.md", "exec"), scope)


def test_the_loop_without_padding_runs(
    tmp_path: Path,
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (block,) = blocks("python", (Path(__file__).parent.parent / "docs/padding.md").read_text())
    shutil.copytree(folder, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    scope: dict[str, Any] = {}
    exec(compile(block, "padding.md", "exec"), scope)
    metrics = scope["loader"].metrics()
    assert metrics["padding_share"] == 0
    assert metrics["trained"] == metrics["observed"] > 0


def test_it_is_read_in_a_few_minutes_and_leads_to_what_is_there() -> None:
    assert len(README.splitlines()) < 200
    root = Path(__file__).parent.parent
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert len(links) > 10
    assert not [link for link in links if not (root / link).exists()]


def test_the_commands_parse() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("slap-")]
    assert len(commands) >= 2
    for line in commands:
        name, *arguments = shlex.split(line, comments=True)
        PARSERS[name]().parse_args(arguments)
