"""The recipe for Lightning, as docs/trainers.md has it: it trains, and goes on exactly."""

from __future__ import annotations

import pytest

lightning = pytest.importorskip("lightning")


from tests.test_training import folder  # noqa: E402, F401  (a fixture)

BATCH, BATCHES = 8, 18
