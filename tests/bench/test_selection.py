"""The selection benchmark: what its corpora are made of, its runs, and what it makes of results."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from slap_stream import SlapConfig, per_sample_loss
from slap_stream.errors import CorpusError
from slap_stream.selection.policies.registry import make_policy
from tests.helpers.tiny_models import llama
from tools.bench.selection import __main__ as bench_selection
from tools.bench.selection import dirt, generation, scoring, subsets, tasks, training
from tools.bench.selection.copies import near_copy
from tools.bench.selection.corpora import Workshop, groups_of_copies
from tools.bench.selection.report import Difference, holm, reached_after, tables
from tools.bench.selection.results import append_row, read_rows
from tools.bench.selection.schedule import PRESETS, Preset, RunKey, arms, rate
from tools.bench.selection.scoring import encoded

WORDS = [f"word{n}" for n in range(60)]
TINY = Preset(
    name="tiny",
    size=160,
    epochs=2,
    hidden=32,
    layers=1,
    vocabulary=400,
    max_tokens=64,
    batch_size=8,
    micro_batches=2,
    evaluations=2,
    heldout_per_task=8,
    pretraining_steps=4,
    shard_bytes=8_000,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files in the shapes of the real ones."""
    place = tmp_path_factory.mktemp("data")
    for name in tasks.TASKS:
        for part, count in (("train", 400), ("test", 30)):
            rng = random.Random(f"{name} {part}")
            turns = 3 if name == "sgd" else 1
            with gzip.open(place / f"{name}.{part}.jsonl.gz", "wt") as file:
                for number in range(count):
                    messages = []
                    for _ in range(turns):
                        said = [*(["say:"] if name == "tatoeba" else []), *rng.sample(WORDS, 8)]
                        messages += [
                            {"role": "user", "content": " ".join(said)},
                            {"role": "assistant", "content": " ".join(said[:4])},
                        ]
                    record = {"id": f"{name}-{part}-{number}", "source": "x", "messages": messages}
                    file.write(json.dumps(record) + "\n")
    return place


def answers(records: list[dict[str, Any]]) -> Counter[str]:
    """How often each answer occurs."""
    return Counter(
        turn["content"]
        for record in records
        for turn in record["messages"]
        if turn["role"] == "assistant"
    )


def test_a_condition_is_told_by_its_name() -> None:
    for name in ("balanced", "gsm8k+copies", "imbalanced+copies+shuffled", "five+mixed30"):
        assert tasks.Condition.of(name).name == name
    with pytest.raises(ValueError, match=r"condition must be one of balanced, .*got 'balanced\+x'"):
        tasks.Condition.of("balanced+x")
    with pytest.raises(ValueError, match=r"with \+mixed and a percentage, got 'five\+mixed0'"):
        tasks.Condition.of("five+mixed0")


def test_a_dirty_mixture_holds_what_it_says(data: Path) -> None:
    clean = tasks.training_records(data, tasks.Condition.of("imbalanced"), 200, seed=0)
    assert Counter(r["source"] for r in clean) == {
        "t0_50k": 130,
        "sgd": 40,
        "tatoeba": 20,
        "gsm8k": 10,
    }
    assert {r["kind"] for r in clean} == {"clean"}
    dirty = tasks.training_records(
        data, tasks.Condition.of("imbalanced+copies+shuffled"), 200, seed=0
    )
    kinds = Counter(record["kind"] for record in dirty)
    assert len(dirty) == 250
    assert kinds["copy"] == 50
    assert kinds["first"] == 3
    assert kinds["shuffled"] == pytest.approx(50, abs=4)
    assert len({record["id"] for record in dirty}) == len(dirty)
    again = tasks.training_records(
        data, tasks.Condition.of("imbalanced+copies+shuffled"), 200, seed=0
    )
    assert again == dirty
    # What the base model was trained on is nowhere fine-tuned on.
    seen = {r["id"] for name in tasks.TASKS for r in tasks.split_training(data, name)[0]}
    assert seen
    assert not seen & {record["id"].split(":")[1] for record in clean}


def test_shuffled_targets_stay_in_their_source(data: Path) -> None:
    _, records = tasks.split_training(data, "gsm8k")
    before = answers(records)
    dirt.shuffle_targets(records, random.Random(0))
    assert answers(records) == before
    assert sum(record.get("kind") == "shuffled" for record in records) == len(records)


def test_mixed_dirt_is_of_every_kind_and_labelled(data: Path) -> None:
    condition = tasks.Condition.of("gsm8k+mixed50")
    clean = {
        record["id"].partition(":")[2]: record["messages"]
        for record in tasks.training_records(data, tasks.Condition.of("gsm8k"), 400, seed=1)
    }
    records = tasks.training_records(data, condition, 400, seed=1)
    kinds = Counter(record["kind"] for record in records)
    assert len(records) == len(clean) == len({record["id"] for record in records})
    assert set(kinds) == {"clean", "first", *dirt.MIXED}
    for record in records:
        kind, _, name = record["id"].partition(":")
        before = clean.get(name.rsplit("-", 1)[0] if kind in ("exact", "copy") else name)
        same = before == record["messages"]
        assert kind == record["kind"]
        assert before is not None
        # An edit of a near-copy may change nothing.
        assert kind == "copy" or same == (kind in ("clean", "first", "exact"))
    assert tasks.training_records(data, condition, 400, seed=1) == records


@given(st.text(min_size=1), st.integers(0, 99))
def test_changed_numbers_are_all_others_of_as_many_digits(text: str, seed: int) -> None:
    said = f"{text} 7 and 2048"
    changed = dirt.changed_numbers(said, random.Random(seed))
    old, new = re.findall(r"\d+", said), re.findall(r"\d+", changed)
    assert [*map(len, old)] == [*map(len, new)]
    assert all(a != b for a, b in zip(old, new, strict=True))
    assert re.sub(r"\d", "", said) == re.sub(r"\d", "", changed)


def some_known(count: int = 12, keep: float = 0.5) -> subsets.Known:
    """Records of which each third is like the one before it."""
    records, rng = [], np.random.default_rng(0)
    vectors = rng.standard_normal((count, 8)).astype(np.float32)
    for number in range(count):
        copied = number % 3 == 2
        said = " ".join(random.Random(number - copied).sample(WORDS, 20))
        if copied:
            vectors[number] = vectors[number - 1] + 0.01
        asked = said + " please" * copied
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "a" * number}]
        kind = "copy" if copied else "clean"
        records.append({"id": str(number), "source": "s", "messages": turns, "kind": kind})
    return subsets.Known(
        records=records,
        embeddings=vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        keep=keep,
        aim="s",
        nearness=lambda: -np.abs(np.arange(count) - 4.0),
        instruction_difficulty=lambda: np.arange(count) / 8,
    )


@pytest.mark.parametrize("choice", ["minhash", "embedding", "truth"])
def test_of_near_copies_the_first_is_left(choice: str) -> None:
    left = subsets.CHOICES[choice](some_known())
    assert left.tolist() == [True, True, False] * 4


def test_choices_with_a_budget_keep_it() -> None:
    known = some_known()
    assert np.flatnonzero(subsets.longest(known)).tolist() == [6, 7, 8, 9, 10, 11]
    assert np.flatnonzero(subsets.nearest(known)).tolist() == [1, 2, 3, 4, 5, 6]
    assert subsets.of_task(known).all()
    assert not subsets.of_task(replace(known, aim="other")).any()
    # From a ratio of 1 on, at record 8, the prompt does not belong to the answer.
    assert np.flatnonzero(subsets.top_ifd(known)).tolist() == [2, 3, 4, 5, 6, 7]


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=20))
def test_the_auc_counts_pairs(pairs: list[tuple[int, bool]]) -> None:
    scores, dirty = np.array([s for s, _ in pairs]), np.array([d for _, d in pairs])
    value = subsets.auc(scores, dirty, ~dirty)
    if dirty.all() or not dirty.any():
        assert np.isnan(value)
        return
    wins = [(p > n) + 0.5 * (p == n) for p in scores[dirty] for n in scores[~dirty]]
    assert value == pytest.approx(np.mean(wins))


def test_a_near_copy_is_almost_the_same() -> None:
    record = {
        "id": "a",
        "source": "s",
        "messages": [
            {"role": "user", "content": "How many apples does Ann have left of ten?"},
            {"role": "assistant", "content": "She has four apples left."},
        ],
    }
    copies = [near_copy(record, n, random.Random(n)) for n in range(40)]
    words = set("How many apples does Ann have left of ten?".lower().rstrip("?").split())
    for copied in copies:
        said = set(copied["messages"][0]["content"].lower().rstrip("?.! ").split())
        assert len(words - said) <= 2
        assert said <= words | {""}
    assert len({copied["messages"][0]["content"] for copied in copies}) > 10
    assert record["messages"][0]["content"] == "How many apples does Ann have left of ten?"


def test_dialogues_are_cut_after_an_answer(data: Path) -> None:
    task = tasks.Task(name="sgd", max_characters=150, cut_turns=True)
    for record in tasks.read_task(data, task, "train"):
        assert record["messages"][-1]["role"] == "assistant"
        assert sum(len(turn["content"]) for turn in record["messages"]) <= 150


def test_held_out_records_share_little_with_the_training_set(data: Path) -> None:
    _, seen = tasks.split_training(data, "gsm8k")
    fresh = tasks.heldout_records(data, "gsm8k", {"gsm8k": 10}, seen)
    assert len(fresh) == 10
    told = tasks.heldout_records(data, "gsm8k", {"gsm8k": 30}, [*seen, *fresh[:5]])
    assert not {record["id"] for record in fresh[:5]} & {record["id"] for record in told}


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"data must hold gsm8k.train.jsonl.gz, got no such file"):
        list(tasks.read_task(tmp_path, tasks.TASKS["gsm8k"], "train"))


def test_the_learning_rate_warms_up_and_decays_fully() -> None:
    rates = [rate(progress) for progress in np.linspace(0, 1, 101)]
    assert 0 < rates[0] < 0.1
    assert max(rates) == pytest.approx(1.0, abs=0.01)
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
    assert np.all(np.diff(rates[6:]) <= 0)


@pytest.mark.parametrize("name", sorted(arms()))
def test_every_arm_is_a_config(name: str) -> None:
    arm = arms()[name]
    assert arm.name == name
    make_policy(SlapConfig.from_dict({"keep": 0.7} | dict(arm.config)))


def test_every_preset_names_arms_and_conditions_that_exist() -> None:
    for preset in PRESETS.values():
        assert set(preset.arms) <= set(arms())
        assert [tasks.Condition.of(name).name for name in preset.conditions] == list(
            preset.conditions
        )
        assert preset.rate_for(0.66) == preset.learning_rate[0.7]


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=12))
def test_differences_come_with_students_interval(values: list[float]) -> None:
    difference = Difference.of(values)
    assert difference.mean == pytest.approx(np.mean(values))
    spread = np.std(values, ddof=1)
    if spread > 1e-6:
        low, high = stats.t.interval(
            0.95, len(values) - 1, loc=np.mean(values), scale=spread / len(values) ** 0.5
        )
        assert difference.margin == pytest.approx((high - low) / 2)
        assert difference.p == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue)
        assert difference.mean < difference.upper < difference.mean + difference.margin


def test_one_seed_has_no_interval() -> None:
    assert str(Difference.of([0.25])) == "+0.2500"
    assert str(Difference.of([0.1, 0.3])) == "+0.2000 ± 1.2706"


def result(
    seed: int, loss: float, *, arm: str = "slap", overrides: str = "", preset: str = "small"
) -> dict[str, Any]:
    """A row as a run leaves it."""
    kinds = dict.fromkeys(("clean", "first", "copy", "shuffled"), 1)
    return {
        **RunKey(
            preset=preset,
            condition="balanced",
            arm=arm,
            keep=1.0 if arm == "full" else 0.7,
            seed=seed,
            learning_rate=PRESETS[preset].rate_for(0.7),
            overrides=overrides,
        ).to_dict(),
        "loss": loss,
        "heldout": {"a": loss},
        "curve": [[0, 5.0], [8, loss]],
        "samples": 8,
        "candidates": 10,
        "tokens": 8,
        "probed": 1,
        "offered": kinds,
        "trained": kinds,
        "seconds": {"train": 10.0, "compose": 0.1, "probe": 0.3},
    }


def test_settings_are_compared_with_the_arm_without_them() -> None:
    runs = [result(0, 2.0), result(1, 3.0)]
    runs += [result(0, 2.1, overrides="copy_weight=4"), result(1, 3.3, overrides="copy_weight=4")]
    text = tables(runs)
    assert "- slap with copy_weight=4 - slap: +0.2000 ± 1.2706 (2)." in text


def test_runs_of_other_sizes_are_not_compared() -> None:
    text = tables([result(0, 2.0, arm="full"), result(0, 3.0, preset="long")])
    assert "### balanced\n" in text
    _, _, other = text.partition("### balanced, preset long\n")
    assert "| slap | 0.80 | 3.0000 |  |  |" in other


def test_the_time_of_selecting_is_reported() -> None:
    header, _, line = tables([result(0, 2.0)]).splitlines()[2:5]
    cells = dict(zip(header.split(" | "), line.split(" | "), strict=True))
    assert cells["selecting"] == "4%"


def test_holm_corrects_the_smallest_most() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_a_loss_is_reached_when_it_is_not_left_again() -> None:
    row = {"curve": [[0, 5.0], [100, 3.0], [200, 4.0], [300, 2.0]]}
    assert reached_after(row, 3.0) == pytest.approx(250)
    assert reached_after(row, 1.0) == float("inf")
    assert reached_after(row, 6.0) == 0.0


def test_generated_texts_are_scored_by_their_task() -> None:
    assert generation.chrf(["a small boat"], ["a small boat"]) == pytest.approx(100.0)
    assert generation.chrf(["xyz"], ["a small boat"]) < 1.0
    written = ["so 3 + 4\n#### 1,007", "#### 8.", "it is 9", "#### 10"]
    references = ["#### 1007", "#### 8", "#### 9", "#### 11"]
    assert generation.exact_answers(written, references) == 50.0
    # What gives no answer is not right because the reference gives none either.
    assert generation.exact_answers(["none"], ["none"]) == 0.0


class Parrot:
    """Writes for each prompt the answer that it was told."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]], end: int) -> None:
        self.answers, self.end = answers, end

    def eval(self) -> None:
        """Nothing changes."""

    train = eval

    def generate(self, ids: torch.Tensor, *, attention_mask: torch.Tensor, **_: Any) -> Any:
        """Rows of prompt and answer, ended and filled with the end mark."""
        width = max(map(len, self.answers.values())) + 1
        rows = []
        for row, mask in zip(ids, attention_mask, strict=True):
            answer = self.answers[tuple(row[mask.bool()].tolist())]
            rows.append([*row.tolist(), *answer, *[self.end] * (width - len(answer))])
        return torch.tensor(rows)


def test_prompts_of_any_length_are_answered_and_scored(data: Path, tmp_path: Path) -> None:
    workshop = Workshop(data, tmp_path, TINY)
    tokenizer, records = workshop.tokenizer(), workshop.heldout("tatoeba")
    for number, record in enumerate(records):
        record["messages"][0]["content"] += " word1" * (number % 3)
    rows = [row for _, row in encoded(records, tokenizer, TINY.max_tokens)]
    told = {}
    for row in rows:
        at = row["supervised"].index(True)
        told[tuple(row["input_ids"][:at])] = row["input_ids"][at:]
    assert len({len(prompt) for prompt in told}) > 1
    parrot = Parrot(told, tokenizer.eos_token_id)
    scores = generation.generation_scores(parrot, tokenizer, records, TINY)
    assert scores == {"tatoeba": pytest.approx(100.0)}
    assert generation.generation_scores(parrot, tokenizer, [], TINY) == {}


def test_runs_are_made_once_and_reported(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    given = [
        *("--data", str(data), "--out", str(tmp_path), "--preset", "tiny", "--seeds", "1"),
        *("--conditions", "balanced+copies+shuffled", "--set", "warmup_losses=16"),
    ]
    assert bench_selection.main([*given, "--arms", "uniform_as_auto", "oracle"]) == 0
    assert "uniform_as_auto seed 0: slap_auto has not run" in capsys.readouterr().out
    first = (tmp_path / "results.jsonl").read_text()
    some = ["uniform_as_auto", "oracle", "full", "slap_auto"]
    assert bench_selection.main([*given, "--arms", *some]) == 0
    text = (tmp_path / "results.jsonl").read_text()
    assert text.startswith(first)
    oracle, full, auto, uniform = map(json.loads, text.splitlines())
    assert uniform["samples"] == pytest.approx(auto["samples"], abs=2 * 8)
    assert full["samples"] == full["candidates"] // 8 * 8
    assert oracle["samples"] == int(0.7 * oracle["candidates"] / 2 / 8) * 8 * 2
    assert auto["samples"] <= full["samples"]
    # The oracle knows; and all kinds are accounted for.
    rates = [row["trained"]["shuffled"] / row["offered"]["shuffled"] for row in (full, oracle)]
    assert rates[0] > 0.9
    assert rates[1] < 0.7
    for row in (full, oracle, auto):
        assert sum(row["trained"].values()) == row["samples"]
        assert sum(row["offered"].values()) == row["candidates"]
        assert set(row["heldout"]) == set(tasks.MIXTURES["balanced"])
        assert 0.0 <= row["written"]["tatoeba"] <= 100.0
    printed = capsys.readouterr().out
    assert "| oracle warmup_losses=16 | 0.68 | " in printed
    assert "| worst source | chrF of tatoeba | shuffled |" in printed
    assert json.loads(printed.splitlines()[-1])["balanced+copies+shuffled, preset tiny"]
    assert (tmp_path / "selection.png").read_bytes().startswith(b"\x89PNG")


def said(template: str, answer: str, number: int = 0) -> dict[str, Any]:
    """A record of one question."""
    turns = [
        {"role": "user", "content": f"word{number} word1"},
        {"role": "assistant", "content": answer},
    ]
    return {"id": f"{template}{number}", "source": "s", "messages": turns, "template": template}


def test_templates_with_a_few_short_answers_have_options() -> None:
    records = [said("two", answer) for answer in ("yes", "no") * 3]
    records += [said("many", f"word{n}") for n in range(40)]
    records += [said("rare", answer) for answer in ("a", "b")]
    records += [said("long", answer) for answer in ("x" * 40, "b") * 3]
    assert scoring.options_of(records) == {"two": ["no", "yes"]}


def test_the_likeliest_option_is_what_counts(data: Path, tmp_path: Path) -> None:
    workshop = Workshop(data, tmp_path, TINY)
    tokenizer, model = workshop.tokenizer(), workshop.base_model()
    options = {"t": ["word2", "word3 word4"]}
    records = [said("t", answer, number) for number in range(3) for answer in options["t"]]
    records.append(said("other", "word9"))
    share, count = scoring.rank_classification(records, options, model, tokenizer, TINY)
    assert count == 6
    by_hand = 0
    for record in records[:6]:
        asked = [said("t", option, int(record["id"][1:])) for option in options["t"]]
        rows = [row for _, row in encoded(asked, tokenizer, TINY.max_tokens)]
        losses, _ = scoring.losses_of(rows, model, tokenizer, TINY)
        by_hand += options["t"][losses.argmin()] == record["messages"][1]["content"]
    assert share == pytest.approx(100 * by_hand / 6)


def test_baselines_on_a_pretrained_model(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workshop = Workshop(data, tmp_path, TINY)
    workshop.tokenizer().save_pretrained(tmp_path / "llama")
    workshop.base_model().save_pretrained(tmp_path / "llama")
    tiny = replace(TINY, name="real", size=100, ranked=("t0_50k",), generated=())
    monkeypatch.setitem(PRESETS, "real", tiny)
    given = ["--data", str(data), "--out", str(tmp_path), "--preset", "real", "--seeds", "1"]
    given += ["--conditions", "five+mixed30"]
    with pytest.raises(SystemExit):
        bench_selection.main(given)
    assert "--model must be given with the preset real" in capsys.readouterr().err
    given += ["--model", str(tmp_path / "llama"), "--lora"]
    some = ["full", "dedupe", "removal_equal", "top_ifd", "slap_judge"]
    assert bench_selection.main([*given, "--arms", *some]) == 0
    rows = {row["arm"]: row for row in read_rows(tmp_path / "results.jsonl")}
    full, deduplicated, equal = (rows[arm] for arm in some[:3])
    assert {row["preset"] for row in rows.values()} == {"real-llama-lora"}
    # Of a record and its three copies one is left, whichever comes first.
    assert deduplicated["trained"]["exact"] <= 2 < full["trained"]["exact"]
    assert deduplicated["samples"] <= full["samples"] == equal["samples"]
    assert {kind for kind, count in equal["trained"].items() if count} == {"clean", "first"}
    assert rows["top_ifd"]["prepared"] > 0 == full["prepared"]
    assert rows["top_ifd"]["samples"] <= 0.7 * full["candidates"]
    assert full["auc"]["shuffled"] <= 1.0
    assert rows["slap_judge"]["prepared"] > 0
    capsys.readouterr()
    assert bench_selection.main([*given, "--evidence"]) == 0
    printed = capsys.readouterr().out
    assert "### five+mixed30: 1 seeds, the judge read " in printed
    offered = {kind: count // 2 for kind, count in full["offered"].items() if count}
    for kind, count in offered.items():
        assert f"| {kind} | {count} | " in printed
    assert all(row["offered"] == full["offered"] for row in rows.values())


def test_arms_that_are_aimed_at_a_task_are_compared_by_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PRESETS, "tiny", replace(TINY, epochs=1, generated=(), evaluations=1))
    given = ["--data", str(data), "--out", str(tmp_path), "--preset", "tiny", "--seeds", "1"]
    given += ["--conditions", "balanced", "--keep", "0.4"]
    some = ["uniform", "slap_target_gsm8k", "nearest_gsm8k", "only_gsm8k", "only_gsm8k_budget"]
    assert bench_selection.main([*given, "--arms", *some]) == 0
    rows = {row["arm"]: row for row in read_rows(tmp_path / "results.jsonl")}
    budget = [rows[arm]["samples"] for arm in some if arm != "only_gsm8k"]
    assert budget == [64] * 4
    # 15 % of 160.
    assert rows["only_gsm8k"]["samples"] == 24
    printed = capsys.readouterr().out
    assert "Aimed at gsm8k:" in printed
    assert "Aimed at sgd:" not in printed
    assert f"| only_gsm8k | 0.15 | {rows['only_gsm8k']['heldout']['gsm8k']:.4f} | " in printed


@pytest.mark.parametrize("arm", ["rho_loss", "greats", "infobatch"])
def test_peers_get_what_their_sources_have(
    arm: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "tiny", replace(TINY, size=64, epochs=1))
    given = ["--data", str(data), "--out", str(tmp_path), "--preset", "tiny", "--seeds", "1"]
    given += ["--conditions", "gsm8k", "--arms", arm, "--set", "warmup_losses=8"]
    assert bench_selection.main(given) == 0
    row = json.loads((tmp_path / "results.jsonl").read_text())
    measured = row["probed"] / row["candidates"]
    assert measured < 0.2 if arm == "infobatch" else measured > 0.6
    assert (tmp_path / "made-tiny" / "reference-gsm8k").exists() == (arm == "rho_loss")


def test_half_a_line_of_a_killed_run_is_no_result(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "results.jsonl"
    row = dict.fromkeys(RunKey.__slots__, 1)
    assert read_rows(path) == []
    append_row(path, row)
    with path.open("a") as file:
        file.write('{"preset": "small", "condi')
    assert read_rows(path) == [row]
    assert "ends with half a line" in caplog.text
    append_row(path, row | {"seed": 2})
    assert read_rows(path) == [row, row | {"seed": 2}]
    with path.open("a") as file:
        file.write('{"preset": "small"}\n')
    with pytest.raises(CorpusError, match=r"one run a line, got .* in line 3 of .*results.jsonl"):
        read_rows(path)


def test_copies_are_grouped_with_their_record_or_with_the_first_of_them() -> None:
    ids = ["copy:a-1-0", "clean:b-2", "first:a-1", "copy:c-7", "copy:a-1-12", "copy:c-5"]
    # The record that c's copies were made of did not come into the corpus.
    assert groups_of_copies(ids) == [2, -1, 2, 3, 2, 3]


def test_a_task_is_compared_record_by_record() -> None:
    runs = [result(seed, 2.0, arm="full") for seed in range(2)] + [result(0, 2.0)]
    for row, losses in zip(runs, ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [1.5, 2.5, 9.0]), strict=True):
        row["losses"] = {"a": losses}
    # Of seed 0 alone, which both have: 0.5, 0.5 and 6 more; the medians are 2 and 2.5.
    margin = 4.302653 * np.std([0.5, 0.5, 6.0], ddof=1) / 3**0.5
    assert f"| slap - full | +2.333 ± {margin:.3f} (+0.500) | 1 |" in tables(runs)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1_000))
def test_the_head_reads_supervised_tokens_alone_and_the_losses_stay(seed: int) -> None:
    torch.manual_seed(seed)
    model = llama()
    ids = torch.randint(0, model.config.vocab_size, (3, 9))
    labels = torch.where(torch.rand(3, 9) < 0.4, ids, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    losses = training._losses(model, batch, TINY)
    whole = per_sample_loss(
        model(input_ids=ids, attention_mask=batch["attention_mask"]).logits, labels
    )
    torch.testing.assert_close(losses, whole)
