"""The benchmark of the composer, on a corpus small enough for a test."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.laws import config_of
from tools.bench.composer import __main__ as bench_composer
from tools.bench.composer import arms
from tools.bench.composer.corpus import VirtualCorpus, shards_of


def test_a_virtual_corpus_is_a_function_of_the_id() -> None:
    corpus = VirtualCorpus(10**9, dim=8, table_rows=5000)
    ids = np.array([3, 5003, 999_999_999, 17])
    rows, again = corpus.read_ids(ids), corpus.read(17, 18)
    np.testing.assert_array_equal(rows.embedding[0], rows.embedding[1])
    np.testing.assert_array_equal(rows.embedding[3], again.embedding[0])
    np.testing.assert_allclose(np.linalg.norm(rows.embedding.astype(float), axis=1), 1, atol=0.01)
    assert len(np.unique(corpus.losses(ids))) == 4
    assert corpus.sketches(ids, 16).shape == (4, 16)


@pytest.mark.parametrize("samples", [1, 999, 1000, 2500, 10**9])
def test_shards_hold_all_samples(samples: int) -> None:
    sizes = shards_of(samples)
    assert sizes.sum() == samples
    assert sizes.min() > 0
    assert len(sizes) <= 100_000


def test_speed_is_measured_with_a_fitted_regression_and_a_learnt_metric() -> None:
    result = arms.speed(
        samples=3000, dim=16, batch_size=16, warmup=40, steps=24, config=config_of(sketch_dim=16)
    )
    assert result["fitted"] == result["metric_from_sketches"] == 1
    assert result["batch_ms_p50_cpu"] <= result["batch_ms_p99_cpu"]
    # All is more than composing alone; the parts add up to what both clocks see, roughly.
    assert result["candidates_per_second_with_all_cpu"] < result["candidates_per_second_cpu"]
    assert {"choose: quotas", "offer: score", "refresh: other"} <= set(result["parts_ms_per_batch"])
    assert all(value >= 0 for value in result["parts_ms_per_batch"].values())


def test_memory_is_measured_and_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--dim", "16", "--batch-size", "16", "--steps", "6", "--pool-batches", "2"]
    assert bench_composer.main([*small, "--arm", "memory:20000"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["samples"], result["shards"]) == (20_000, 20)
    assert result["first_batch_seconds"] > result["start_seconds"] >= 0
