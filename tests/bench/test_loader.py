"""The loader benchmark: every arm delivers the corpus, and ratios are taken round by round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tools.bench.loader import __main__ as bench_loader
from tools.bench.loader import arms, corpora, report

SAMPLES = 1100


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpora")


@pytest.mark.parametrize(
    ("arm", "kind", "remote"),
    [
        ("stock", "short", False),
        ("uniform", "mixed", True),
        ("slap", "tokens", False),
        ("reading", "short", True),
        ("datasets", "mixed", False),
    ],
)
def test_an_arm_delivers_what_it_should(
    data: Path, tmp_path: Path, arm: str, kind: str, remote: bool
) -> None:
    corpus = corpora.write_corpus(data, kind, SAMPLES)
    if arm in arms.EXTRAS:
        arms.prepare_extra(arm, corpus, kind, SAMPLES)
    run = arms.Run(
        arm=arm,
        corpus=str(corpus),
        kind=kind,
        remote=remote,
        num_workers=0,
        seconds=60.0,
        cache=str(tmp_path),
    )
    found = arms.measure(run)
    # The first batch is not counted; slap trains on whole batches of 70 %.
    all_of_it = {"slap": 3 * 256, "uniform": 4 * 256}.get(arm, SAMPLES)
    assert found["samples"] == all_of_it - 256
    assert found["samples_per_second"] > 0
    assert (found["select_seconds_per_sample"] > 0) == (arm in ("slap", "uniform"))


def test_what_a_batch_is_trained_on_elsewhere_does_not_count(data: Path) -> None:
    corpus = corpora.write_corpus(data, "short", SAMPLES)
    run = arms.Run(
        arm="slap",
        corpus=str(corpus),
        kind="short",
        remote=False,
        num_workers=0,
        seconds=60.0,
        step_seconds=1.0,
    )
    found = arms.measure(run)
    # Two batches of it; a second each would be 256 samples a second.
    assert found["samples_per_second"] > 512
    assert found["milliseconds_per_batch"] == pytest.approx(256e3 / found["samples_per_second"])


def test_a_corpus_is_as_described_and_written_once(data: Path) -> None:
    lengths = [len(sample["text"]) for sample in corpora.samples("mixed", 300)]
    assert 100 <= min(lengths) < 300
    assert 10_000 < max(lengths) <= 20_000
    assert all(300 <= len(s["text"]) < 700 for s in corpora.samples("short", 50))
    [tokens] = corpora.samples("tokens", 1)
    assert (tokens["input_ids"].dtype, tokens["input_ids"].shape) == (np.int32, (2048,))
    corpus = corpora.write_corpus(data, "short", SAMPLES)
    before = {path: path.stat().st_mtime_ns for path in corpus.iterdir()}
    assert corpora.write_corpus(data, "short", SAMPLES) == corpus
    assert {path: path.stat().st_mtime_ns for path in corpus.iterdir()} == before


def _result(arm: str, number: int, rate: float, workers: int = 0) -> dict[str, Any]:
    return {
        "kind": "short",
        "remote": False,
        "num_workers": workers,
        "arm": arm,
        "round": number,
        "samples_per_second": rate,
        "milliseconds_per_batch": 256e3 / rate,
        "select_seconds_per_sample": 0.0 if arm == "stock" else 1e-5,
        "wait_seconds_per_sample": 0.0,
        "main_cpu_seconds_per_sample": 1e-5,
        "first_batch_seconds": 1.0,
        "peak_bytes": 1e9,
    }


def test_ratios_are_to_the_stock_loader_of_the_same_round() -> None:
    # A machine that slows down: rates of different rounds cannot be compared.
    rates = {"stock": [1000.0, 500.0, 100.0], "uniform": [5000.0, 3000.0, 400.0]}
    results = [_result(arm, n, rates[arm][n]) for n in range(3) for arm in rates]
    results.append(_result("uniform", 0, 9e9, workers=2))
    stock, uniform, alone = report.rows(results)
    assert (stock["ratio"], stock["arm"]) == (1.0, "stock")
    assert [uniform[f"ratio{part}"] for part in ("", "_low", "_high")] == [5.0, 4.0, 6.0]
    assert uniform["samples_per_second"] == 3000.0
    assert uniform["selecting_share"] == pytest.approx(0.03)
    assert (alone["ratio"], alone["num_workers"]) == (None, 2)
    table = report.text([stock, uniform, alone])
    assert "| short | 0 | uniform | 3,000 | 85.3 | 5.0 [4.0, 6.0] | 3% |" in table


def test_arms_take_turns_and_an_interrupted_run_reports(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[tuple[str, int]] = []

    def measure(run: arms.Run) -> dict[str, Any]:
        order.append((run.arm, run.num_workers))
        if len(order) > 5:
            raise KeyboardInterrupt
        return _result(run.arm, 0, 10.0) | {"num_workers": run.num_workers}

    monkeypatch.setattr(bench_loader, "measure", measure)
    options = ["--data", str(data), "--samples", str(SAMPLES), "--corpora", "short"]
    options += ["--arms", "stock", "uniform", "--rounds", "2", "--workers", "0", "2"]
    assert bench_loader.main(options) == 130
    assert order == [("stock", 0), ("uniform", 0)] * 2 + [("stock", 2), ("uniform", 2)]
    printed = capsys.readouterr().out.splitlines()
    assert [row["arm"] for row in json.loads(printed[-1])] == ["stock", "uniform", "stock"]


def test_arms_that_are_not_installed_are_skipped_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(arms.EXTRAS, "litdata", "a_module_that_nobody_has")
    assert bench_loader.installed(["stock", "litdata"]) == ["stock"]
    assert "litdata: skipped, it is not installed" in capsys.readouterr().out


def test_a_run_that_fails_says_why(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(run: arms.Run) -> dict[str, Any]:
        raise ChildProcessError("stock must run to its end, ended with 1: a broken disk")

    monkeypatch.setattr(bench_loader, "measure", measure)
    options = ["--data", str(data), "--samples", str(SAMPLES), "--corpora", "short"]
    assert bench_loader.main([*options, "--arms", "stock"]) == 1
    assert "ended with 1: a broken disk" in capsys.readouterr().err
