"""A work directory belongs to one process and one plan at a time."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from slap_stream.core.work_dir import claimed
from slap_stream.errors import CorpusError


def claim(
    out: Path, plan: dict[str, object], *, overwrite: bool | None = None
) -> AbstractContextManager[None]:
    return claimed(out / "work", plan, result=out, name="out", overwrite=overwrite)


def test_what_the_same_plan_left_is_gone_on_with(tmp_path: Path) -> None:
    for done in (False, True):
        with claim(tmp_path, {"seed": 1}):
            assert (tmp_path / "work" / "part.json").exists() == done
            (tmp_path / "work" / "part.json").touch()


def test_what_another_plan_left_is_refused_or_thrown_away(tmp_path: Path) -> None:
    with claim(tmp_path, {"seed": 1, "dim": 8}):
        (tmp_path / "work" / "part.json").touch()
        (tmp_path / "work" / "store").mkdir()
    for overwrite, cure in ((None, "delete it"), (False, "pass overwrite to begin again")):
        with (
            pytest.raises(CorpusError, match=rf"left by one with other seed; make .*, or {cure}"),
            claim(tmp_path, {"seed": 2, "dim": 8}, overwrite=overwrite),
        ):
            pass
    assert (tmp_path / "work" / "part.json").exists()
    with claim(tmp_path, {"seed": 2, "dim": 8}, overwrite=True):
        assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["lock", "plan.json"]
    with claim(tmp_path, {"seed": 2, "dim": 8}):
        pass


def test_what_no_plan_explains_is_thrown_away(tmp_path: Path) -> None:
    """A kill while another plan's leavings were thrown away: what is left belongs to nobody."""
    with claim(tmp_path, {"seed": 1}):
        (tmp_path / "work" / "part.json").touch()
        (tmp_path / "work" / "plan.json").unlink()
    with claim(tmp_path, {"seed": 2}):
        assert not (tmp_path / "work" / "part.json").exists()


def test_it_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    with (
        claim(tmp_path, {"seed": 1}),
        pytest.raises(
            CorpusError, match=r"out must not be in use, got .*; wait for it, or stop it"
        ),
        claim(tmp_path, {"seed": 1}),
    ):
        pass
    with claim(tmp_path, {"seed": 1}):
        pass
