"""The probe's benchmark: what it feeds the model, and what it says of sketches."""

from __future__ import annotations

import json

import pytest

from tools.bench import probe as bench_probe


def test_words_become_tokens_and_prompts_are_not_supervised() -> None:
    def record(prompt: str, target: str) -> dict[str, list[dict[str, str]]]:
        return {"messages": [{"content": prompt}, {"content": target}]}

    batch = bench_probe.WordCollator()([record("w3 w1", "w5"), record("w2", "w4 w6 w7")])
    assert batch["input_ids"].tolist() == [[3, 1, 5, 0], [2, 4, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 5, -100], [-100, 4, 6, 7]]


def test_sketches_err_about_as_much_as_dense_projections() -> None:
    errors = bench_probe.sketch_errors("cpu", vocabulary=128, hidden=32, pairs=48, tokens=8)
    assert 0.3 < errors["mean_cosine"] < 0.7
    # A random projection to k numbers errs by about (1 - cosine ** 2) / sqrt(k).
    assert errors["dense_rms_error"] == pytest.approx(0.75 / 512**0.5, rel=0.3)
    assert errors["tensor_sketch_rms_error"] < 1.5 * errors["dense_rms_error"]


def test_the_cost_of_selection_is_taken_apart(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_probe, "WORDS_PER_RECORD", (6, 12))
    monkeypatch.setattr(bench_probe, "WARMUP_REFRESHES", 1)
    sizes = ["--hidden", "32", "--layers", "1", "--vocabulary", "64", "--batch-size", "16"]
    assert bench_probe.main([*sizes, "--refreshes", "1", "--threads", "1"]) == 0
    cost = json.loads(capsys.readouterr().out.splitlines()[-1])
    # A tenth of what is offered, of which seven tenths are trained on; a short run offers unevenly.
    assert 0.1 < cost["probed_per_trained"] < 0.15 / 0.7
    assert cost["modelled_share"] == pytest.approx(cost["probed_per_trained"] / 3, abs=1e-3)
    assert cost["training_seconds"] > 0
    selection = cost["composing_seconds"] + cost["probing_seconds"]
    assert cost["selection_share"] == pytest.approx(
        selection / cost["training_seconds"], rel=0.05, abs=0.01
    )
