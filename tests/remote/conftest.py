"""One S3 server for the tests of a process, empty for each; no waiting between attempts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slap_stream.remote import bucket
from tests.helpers.object_store import ObjectStore, object_store


@pytest.fixture(scope="session")
def _server() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture
def store(
    _server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ObjectStore]:
    monkeypatch.setattr(bucket, "BACKOFF_SECONDS", 0.001)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    bucket._clients.clear()
    yield _server
    _server.clear()
    bucket._clients.clear()


@pytest.fixture
def uploaded(store: ObjectStore, local: Path) -> ObjectStore:
    """The store with what lies in `local`, a fixture of the module that asks, as `corpus`."""
    for path in sorted(local.rglob("*")):
        if path.is_file():
            store.put(f"corpus/{path.relative_to(local).as_posix()}", path.read_bytes())
    return store
