"""The recipes for Accelerate and Lightning, as docs/trainers.md has them, resumed and on ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.recipes_run import EPOCHS, fit, lightning_module
from tests.loader.test_ranks import run_module
from tests.test_training import folder  # noqa: F401  (a fixture)

# 206 candidates in global batches of 8, of which 0.7 are kept: 18 an epoch, with a group of two
# after the last four that are accumulated.
BATCHES = 18
GROUPS = [4, 8, 12, 16, 18]
STEPS = GROUPS + [BATCHES + batch for batch in GROUPS]


@pytest.fixture(scope="module")
def ranks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:  # noqa: F811
    """What each of two ranks trained on."""
    out = tmp_path_factory.mktemp("ranks")
    run_module("tests.helpers.recipes_run", folder, out)
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("library", ["accelerate", "lightning"])
def test_ranks_divide_the_batches_once_and_resume(
    ranks: list[dict[str, Any]], library: str
) -> None:
    pytest.importorskip(library)
    results = [result[library] for result in ranks]
    for result in results:
        assert result["model"] == "DistributedDataParallel"
        assert result["steps"] == STEPS
        # Saved after 8 or after 12 batches.
        assert len(result["resumed"]) in (28, 24)
        assert result["resumed"] == result["ids"][-len(result["resumed"]) :]
        assert result["same losses"]
    assert results[0]["weights"] == results[1]["weights"]
    for epoch in range(EPOCHS):
        parts = [r["ids"][epoch * BATCHES : (epoch + 1) * BATCHES] for r in results]
        ids = [i for part in parts for batch in part for i in batch]
        assert len(set(ids)) == len(ids) == BATCHES * 8


def test_accelerate_decays_a_scheduler_once_for_all_ranks(ranks: list[dict[str, Any]]) -> None:
    assert [result["accelerate"]["rates"] for result in ranks] == [[0.0], [0.0]]


@pytest.fixture(scope="module")
def tuned(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:  # noqa: F811
    """Two epochs of Lightning's recipe in one go, and where its checkpoints are."""
    pytest.importorskip("lightning")
    module, saved = lightning_module(folder), tmp_path_factory.mktemp("lightning")
    fit(module, saved)
    return module, saved


# Lightning warns of much that is meant so (few workers, a short epoch), and of its own ways.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("checkpoint", "done", "num_workers"),
    [("step=3", 12, 0), ("step=6", 22, 0), ("step=6", 22, 1), ("epoch=0", 18, 0)],
)
def test_lightning_goes_on_exactly(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    tuned: tuple[Any, Path],
    checkpoint: str,
    done: int,
    num_workers: int,
) -> None:
    unbroken, saved = tuned
    assert unbroken.steps == STEPS
    assert unbroken.loader.metrics()["probe_steps"] == len(STEPS)
    for epoch in (unbroken.ids[:BATCHES], unbroken.ids[BATCHES:]):
        assert len(set(chain.from_iterable(epoch))) == BATCHES * 8
    again = lightning_module(folder, num_workers=num_workers)
    fit(again, tmp_path, saved / f"{checkpoint}.ckpt")
    assert again.ids == unbroken.ids[done:]
    assert again.losses == unbroken.losses[done:]


@pytest.mark.filterwarnings("ignore")
def test_lightnings_mixed_precision_is_the_probes_too(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    pytest.importorskip("lightning")
    module, read = lightning_module(folder), set()
    module.model.model.register_forward_hook(
        lambda model, inputs, output: read.add((model.training, torch.is_autocast_enabled("cpu")))
    )
    fit(module, tmp_path, precision="bf16-mixed", max_steps=2)
    assert {(True, True), (False, True)} <= read
