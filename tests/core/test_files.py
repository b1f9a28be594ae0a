"""Where files may lie."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slap_stream.core.files import local_path, path_to_write
from slap_stream.errors import CorpusError

SCHEMES = ("s3", "gs", "az", "hf", "https", "file", "gcs", "oci", "abfss", "dbfs", "S3")


@given(st.sampled_from(SCHEMES), st.text("ab/.", max_size=9), st.booleans())
def test_what_names_another_place_is_refused_and_no_folder_made(
    scheme: str, rest: str, as_path: bool
) -> None:
    path = f"{scheme}://{rest}"
    for check in (local_path, path_to_write):
        with pytest.raises(CorpusError, match=r"^out must be a path on a local disk, got .*; \w+"):
            check("out", Path(path) if as_path else path)


@pytest.mark.parametrize("path", ["a", "./s3:/a", "/tmp/s3://a", "C:/data", "a:b", "a/b c", "..."])
def test_any_other_name_is_a_path(path: str) -> None:
    assert local_path("out", path) == Path(path)


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 5000])
def test_a_name_that_no_file_can_have_is_refused(path: str) -> None:
    with pytest.raises(CorpusError, match="out must be a path that can be, got "):
        path_to_write("out", path)


def test_a_place_below_a_file_or_that_may_not_be_written_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "new"):
        with pytest.raises(
            CorpusError, match=r"may be written to, got .* where '.*file' is a file"
        ):
            path_to_write("out", path)
    assert path_to_write("out", tmp_path / "new" / "new") == tmp_path / "new" / "new"
    # Nothing is forbidden to root.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(CorpusError, match="may not be written to; choose another"):
        path_to_write("out", tmp_path / "new")
