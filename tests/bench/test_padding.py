"""The benchmark of padding: arms of the same samples, with less and less of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.test_training import folder  # noqa: F401  (a fixture)
from tools.bench import padding as bench_padding


def test_arms_are_of_the_same_samples_and_padding_shrinks(
    folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = ["--batch-size", "4", "--accumulation", "4", "--rounds", "1", "--samples", "32"]
    data, model = str(folder / "data.jsonl"), str(folder / "model")
    assert bench_padding.main([data, "--model", model, *sizes]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    share = {
        (row["batch_size"], row["accumulation"]): row["padding_share"] for row in found["shares"]
    }
    assert share[4, 8] < share[4, 1]
    padded, grouped, free = (found["speeds"][name] for name in bench_padding.ARMS)
    assert padded["tokens"] == grouped["tokens"] == free["tokens"]
    assert padded["positions"] > grouped["positions"] > free["positions"] == free["tokens"]
    assert padded["times_padded"] == 1
