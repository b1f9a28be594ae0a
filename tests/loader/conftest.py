"""A corpus on disk, and the batches of a loader over it that nothing has disturbed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.loader.test_loader import make, run, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpora") / "corpus")


@pytest.fixture(scope="module")
def unbroken(corpus: Path) -> list[list[int]]:
    """Three epochs, read in the main process."""
    loader = make(corpus)
    return run(loader, 3 * len(loader))


@pytest.fixture
def let_go_soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch waits 5 s for each worker of an iterator in which one has died, once it is collected:
    here, and not in whatever test comes later."""
    yield
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    gc.collect()
