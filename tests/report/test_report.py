"""A page says what the log and the corpus hold, whatever the texts try, in a real browser too."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from streaming import StreamingDataset

from slap_stream import SlapDataLoader, embed
from slap_stream.cli.report import main
from slap_stream.errors import AlignmentError, ConfigError
from slap_stream.loader.run_files import LOG_DIR, event_file, read_log
from slap_stream.report import page
from slap_stream.report.corpus_facts import CorpusFacts
from slap_stream.report.picked import SHOWN_OF_REASON, Picker, export
from slap_stream.report.report import PAGE_NAME, Report, report
from slap_stream.report.run_page import _SIGNS
from slap_stream.report.texts import SHOWN, shown
from slap_stream.report.verdict import _WHY
from slap_stream.selection.departures import OUTCOMES, ROW, TRAINED, WITHDRAWN
from slap_stream.selection.scoring import EVIDENCE
from slap_stream.shards.writer import open_writer
from tests.laws import FIRM, config_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:streaming.*")

HOSTILE = (
    "<script>document.title='stolen'</script>"
    "<img src=x onerror=\"document.title='stolen'\">"
    '</pre></article><b onclick="x">\'"&amp; \x00\u202e $\\frac{1}$'
)
SOURCES = ("books", "<i>code</i> $x^", HOSTILE)
NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
COPIES = 40


def write_corpus(path: Path) -> Path:
    """Three hundred samples; the last forty are copies of the first."""
    rng = np.random.default_rng(0)
    words = [f"word{number}" for number in range(400)]
    columns = {"source": "str", "messages": "json"}
    texts = [" ".join(rng.choice(words, 30)) for _ in range(300 - COPIES)]
    with open_writer(path, columns, shard_bytes=20_000) as writer:
        for number, text in enumerate([*texts, *texts[:COPIES]]):
            asked = HOSTILE if number % 50 == 7 else f"Say {number % (300 - COPIES)}."
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]
            source = SOURCES[number % (300 - COPIES) % len(SOURCES)]
            writer.write({"source": source, "messages": turns})
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_corpus(tmp_path_factory.mktemp("report") / "corpus")
    embed(path, dim=64, num_workers=0)
    return path


@pytest.fixture(scope="module")
def run_dir(corpus: Path) -> Path:
    """A run of two epochs, whose losses are made up."""
    folder = corpus.parent / "run"
    loader = SlapDataLoader(
        StreamingDataset(local=str(corpus), batch_size=16),
        embeddings=str(corpus / "embeddings.zarr"),
        config=config_of(keep=0.6, **FIRM),
        collate_fn=lambda samples: {"n": len(samples)},
        run_dir=folder,
    )
    for epoch in range(2):
        for batch in loader:
            loader.observe(batch["sample_id"], np.linspace(1.0, 2.0, 16) - 0.5 * epoch)
        loader.note(held_out=2.0 - epoch)
    loader.close()
    return folder


@pytest.fixture(scope="module")
def made(run_dir: Path) -> Report:
    return report(run_dir, export_to=run_dir / "pruned.csv")


@pytest.fixture(scope="module")
def run_page(made: Report) -> str:
    return Path(made.page).read_text("utf-8")


@pytest.fixture(scope="module")
def corpus_made(corpus: Path) -> Report:
    return report(corpus)


def test_a_run_is_summed_up_as_its_log_has_it(run_dir: Path, made: Report, run_page: str) -> None:
    events, summary = read_log(run_dir), made.summary
    assert made.kind == "run"
    outcomes = Counter(OUTCOMES[number] for number in events.rows["outcome"])
    assert summary["trained"] == outcomes.pop("trained") == 2 * 11 * 16
    assert summary["candidates"] == 600
    assert summary["pruned"] == dict(outcomes)
    assert outcomes["copy"] >= COPIES
    for said in (
        "352 trained on of 600",
        "Held-out loss",
        "keep was fixed at 0.6",
        "copies sample",
    ):
        assert said in run_page
    # Each part of the page, in the order of the questions.
    ids = re.findall(r'<section id="(\w+)"', run_page)
    assert ids == ["verdict", "cost", "loss", "pruned", "samples", "auto", "warnings"]


def test_copies_stand_beside_what_they_copy(run_page: str) -> None:
    cards = re.findall(r"<article.*?</article>", run_page, flags=re.DOTALL)
    copies = [card for card in cards if ">copy</span>" in card]
    assert len(copies) == min(SHOWN_OF_REASON, COPIES)
    for card in copies:
        targets = re.findall(r"<pre dir=\"auto\">(word\d[^<]*)</pre>", card)
        assert len(targets) == 2
        assert targets[0] == targets[1]


def test_what_was_pruned_is_exported_with_reasons(
    run_dir: Path, made: Report, tmp_path: Path
) -> None:
    rows = read_log(run_dir).rows
    pruned = rows[rows["outcome"] != 0]
    key = tuple(pruned[["epoch", "step", "sample_id"]][0].item())
    assert made.exported == len(pruned)
    as_parquet = tmp_path / "pruned.parquet"
    sources = np.array(SOURCES)[rows["sample_id"] % (300 - COPIES) % 3]
    # A text of which half a character is left, as errors quote such.
    errors = {key: "no \ud83d"}
    export(as_parquet, rows, OUTCOMES, sources, errors)
    export(tmp_path / "list.csv", rows, OUTCOMES, sources, errors)
    with (run_dir / "pruned.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    table = pyarrow.parquet.read_table(as_parquet).to_pylist()
    assert table[0]["error"] == "no \\ud83d"
    assert "no \\ud83d" in (tmp_path / "list.csv").read_text("utf-8")
    for line, same, row in zip(lines, table, pruned, strict=True):
        assert int(line["sample_id"]) == same["sample_id"] == row["sample_id"]
        assert line["reason"] == same["reason"] == OUTCOMES[row["outcome"]]
        assert line["source"] == SOURCES[row["sample_id"] % (300 - COPIES) % 3]
        assert int(line["nearest"]) == row["nearest"]
        assert float(line["copy"]) == pytest.approx(row["copy"] / 255, abs=1e-3)


def test_a_corpus_is_described_before_any_training(corpus_made: Report) -> None:
    made = corpus_made
    assert made.kind == "corpus"
    assert made.summary["samples"] == 300
    assert sum(made.summary["sources"].values()) == 300
    # Every copy has its original before it.
    assert made.summary["copy_rate"] * 300 == pytest.approx(COPIES, abs=2)
    text = Path(made.page).read_text("utf-8")
    ids = re.findall(r'<section id="(\w+)"', text)
    assert ids == ["verdict", "overview", "parts", "samples", "warnings"]
    assert "all were compared with all" in text


def test_the_share_of_copies_found_from_a_part_is_that_of_all(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slap_stream.embeddings.store import EmbeddingStore
    from slap_stream.report import corpus_facts

    store = EmbeddingStore(corpus / "embeddings.zarr")
    whole = CorpusFacts(store)
    vectors = np.asarray(store.read(0, 300).embedding, np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for sample, distance in zip(whole.asked[1:], whole.distance[1:], strict=True):
        gaps = np.linalg.norm(vectors[:sample] - vectors[sample], axis=1)
        assert distance == pytest.approx(gaps.min(), abs=2e-3)
    monkeypatch.setattr(corpus_facts, "_MOST_QUERIES", 150)
    monkeypatch.setattr(corpus_facts, "_ROWS_AT_ONCE", 32)
    part = CorpusFacts(store)
    assert len(part.asked) == 150
    at = np.searchsorted(whole.asked, part.asked)
    np.testing.assert_allclose(part.distance, whole.distance[at], atol=2e-3)
    assert abs(part.copy_rate - whole.copy_rate) < 2 * part.copy_error


def test_no_text_gets_out_of_its_place(run_page: str, corpus_made: Report) -> None:
    for text in (run_page, Path(corpus_made.page).read_text("utf-8")):
        scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
        assert scripts == [page.SCRIPT]
        assert "<img" not in text
        assert "<b onclick" not in text
        assert "&lt;script&gt;document.title=" in text
        assert "default-src 'none'" in text
        assert re.search(r"(src|href)=.?(https?:)?//", text) is None
        assert not any(sign in text for sign in ("\x00", "\u202e"))
    assert len(shown("x" * 5000)) == SHOWN + 2


@pytest.mark.skipif(BROWSER is None, reason="needs Debian's chromium")
def test_a_browser_runs_our_script_and_none_of_the_data(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The filter is used as a reader would: a reason is chosen, then a word is searched."""
    drive = """
    const bar = document.querySelector(".filters");
    const [words, , reason] = bar.querySelectorAll("input, select");
    const told = [bar.querySelector("span").textContent];
    const use = (control, value) => {
      control.value = value;
      control.dispatchEvent(new Event("input"));
      told.push(bar.querySelector("span").textContent);
    };
    use(reason, "copy"); use(words, "no such word"); use(words, ""); use(reason, "");
    document.documentElement.dataset.told = told.join("|");
    document.documentElement.dataset.wide = document.documentElement.scrollWidth;
    """
    monkeypatch.setattr(page, "SCRIPT", page.SCRIPT + drive)
    made = report(run_dir, out=tmp_path / "page.html")
    window = "--headless", "--no-sandbox", "--disable-gpu", "--window-size=400,800"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [str(BROWSER), *window, profile, "--dump-dom", Path(made.page).as_uri()]
    seen = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert "<title>What slap did in this run</title>" in seen
    told = re.search(r'data-told="([^"]*)"', seen)
    assert told is not None
    every = seen.count("<article")
    copies = seen.count(">copy</span>")
    counts = [f"{every}", f"{copies}", "0", f"{copies}", f"{every}"]
    assert told[1] == "|".join(f"{count} of {every} samples" for count in counts)
    # Nothing is wider than a phone.
    wide = re.search(r'data-wide="(\d+)"', seen)
    assert wide is not None
    assert int(wide[1]) <= 500


def test_of_a_million_rows_few_samples_are_shown() -> None:
    rng = np.random.default_rng(0)
    rows = np.zeros(200_000, ROW)
    rows["sample_id"] = rng.integers(0, 100_000, len(rows))
    rows["nearest"] = np.where(rng.random(len(rows)) < 0.3, rng.integers(0, 100, len(rows)), -1)
    for name in ("copy", "mismatch", "rank"):
        rows[name] = rng.integers(0, 256, len(rows))
    rows["outcome"] = rng.integers(0, len(OUTCOMES), len(rows))
    picker = Picker(rows, OUTCOMES, np.full(len(rows), "all"), 16, {})
    pruned = picker.pruned()
    assert len(pruned) <= SHOWN_OF_REASON * len(OUTCOMES)
    assert len({one.sample_id for one in pruned}) == len(pruned)
    copies = [one for one in pruned if one.reason == "copy"]
    assert min(one.evidence["copy"] for one in copies) == 1.0
    for one in picker.originals():
        mine = (rows["nearest"] == one.sample_id) & (rows["outcome"] == OUTCOMES.index("copy"))
        assert one.copies == len(np.unique(rows["sample_id"][mine]))
    visits = Counter(rows["sample_id"][rows["outcome"] == 0].tolist())
    assert [one.trained for one in picker.trained()] == sorted(visits.values())[::-1][:16]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"export_to": "list.xlsx"}, r"export must end in \.csv or \.parquet, got 'list\.xlsx'"),
        ({"text_column": "a", "prompt_column": "b"}, "prompt_column and completion_column must be"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(
    run_dir: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        report(run_dir, **options)


def test_what_is_neither_run_nor_corpus_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"path must be the directory of a run, .* or convert"):
        report(tmp_path)
    with pytest.raises(ConfigError, match="export and corpus must be left out for a corpus"):
        report(corpus, export_to="pruned.csv")
    with pytest.raises(AlignmentError, match="run slap-embed on the corpus"):
        report(corpus, embeddings=tmp_path / "none.zarr")
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("slap-report: path must be the directory of a run")


def test_a_trainer_publishes_neither_log_nor_page() -> None:
    # It uploads its output_dir without `_*`.
    assert LOG_DIR.startswith("_")
    assert PAGE_NAME.startswith("_")


def test_shards_that_are_gone_leave_a_page_without_texts(run_dir: Path, tmp_path: Path) -> None:
    made = report(run_dir, corpus=[tmp_path / "gone"], out=tmp_path / "page.html")
    assert any("Texts cannot be shown" in warning for warning in made.warnings)
    assert "The text cannot be read." in Path(made.page).read_text("utf-8")


def test_withdrawn_samples_are_shown_and_listed_with_what_was_raised(
    run_dir: Path, tmp_path: Path
) -> None:
    log = shutil.copytree(run_dir / LOG_DIR, tmp_path / "run" / LOG_DIR)
    rows = read_log(run_dir).rows
    bad = rows[rows["outcome"] == 0][:3]
    samples = [
        (int(row["sample_id"]), int(row["epoch"]), int(row["step"]), f"ValueError: <b>{place}")
        for place, row in enumerate(bad)
    ]
    # As the loader writes it.
    line = {"kind": "withdrawn", "at": (0, 1), "delivered": (0, 0), "time": 0.0, "samples": samples}
    path = event_file(log, 0)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], json.dumps(line) + "\n", *lines[1:]]))
    made = report(log.parent, export_to=tmp_path / "list.csv")
    assert made.summary["withdrawn"] == 3
    assert made.summary["trained"] == 2 * 11 * 16 - 3
    assert sum(made.summary["pruned"].values()) == 600 - 2 * 11 * 16
    assert any(w.startswith("3 samples could not be read") for w in made.warnings)
    with (tmp_path / "list.csv").open(newline="", encoding="utf-8") as file:
        listed = [line for line in csv.DictReader(file) if line["reason"] == "withdrawn"]
    assert {(int(one["sample_id"]), one["error"]) for one in listed} == {
        (sample_id, error) for sample_id, *_, error in samples
    }
    cards = re.findall(r"<article.*?</article>", Path(made.page).read_text("utf-8"), re.DOTALL)
    shown_ones = [card for card in cards if ">withdrawn</span>" in card]
    assert len(shown_ones) == 3
    assert all("ValueError: &lt;b&gt;" in card for card in shown_ones)


def test_the_first_words_say_what_was_pruned_and_what_to_do(made: Report, run_page: str) -> None:
    counts = made.summary["pruned"]
    first = re.search(r'<section id="verdict">.*?</section>', run_page, re.DOTALL)
    assert first is not None
    assert "It trained on 352 of 600 candidates and pruned 248 (41.3%)" in first[0]
    assert f"{counts['copy']} as near-copies of a sample" in first[0]
    assert "remove them from the data" in first[0]
    # Held-out losses were noted.
    assert "Note a held-out loss" not in first[0]


def test_nothing_is_called_sure_that_a_clean_corpus_shows_too(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    column = np.where(np.arange(300) % 100 == 0, 1.0, 0.0)

    def page_of(share: float) -> str:
        monkeypatch.setattr(CorpusFacts, "misplaced_share", share)
        made = report(corpus, out=tmp_path / "page.html")
        return Path(made.page).read_text("utf-8")

    suspects = CorpusFacts._suspects
    monkeypatch.setattr(
        CorpusFacts,
        "_suspects",
        lambda self: setattr(self, "mismatch", column) or suspects(self),  # type: ignore[func-returns-value]
    )
    clean = page_of(0.03)
    assert ">no sign</b>" in clean
    assert "may be misplaced</span>" not in clean
    assert clean.count(">fits its prompt least</span>") == 3
    assert "so all may be right" in clean
    dirty = page_of(0.2)
    assert ">up to 20.0%</b>" in dirty
    assert dirty.count(">may be misplaced</span>") == 3
    assert "probability" not in clean + dirty


@pytest.mark.parametrize("name", ["out", "export_to"])
def test_a_place_that_cannot_be_written_to_is_refused_before_any_work(
    run_dir: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, end = tmp_path / "file", "list.csv"
    file.touch()
    (tmp_path / "folder.csv").mkdir()
    called = "out" if name == "out" else "export"
    for place, said in {
        tmp_path / "folder.csv": r"which is a directory; name a file, such as '.*folder\.csv/NAME'",
        tmp_path / "none" / end: r"where '.*none' is missing; make it first, or name another",
        file / end: r"where '.*file' is a file; name another",
        "s3://bucket/list.csv": "a path on a local disk, got 's3://bucket/list.csv'; write",
    }.items():
        with pytest.raises(ConfigError, match=rf"^{called} must be .*{said}.*\.$"):
            report(run_dir, **{"out": tmp_path / "page.html", name: place})
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ConfigError, match="which may not be written to; name another"):
        report(run_dir, **{"out": tmp_path / "page.html", name: tmp_path / end})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.csv"]


def test_a_run_of_as_many_steps_as_full_data_is_not_said_to_save(
    run_dir: Path, run_page: str, tmp_path: Path
) -> None:
    spending = shutil.copytree(run_dir, tmp_path / "run")
    log = spending / LOG_DIR / "rank-0.jsonl"
    said = log.read_text("utf-8")
    assert '"steps": "fewer"' in said
    log.write_text(said.replace('"steps": "fewer"', '"steps": "full"'), "utf-8")
    spent = Path(report(spending).page).read_text("utf-8")
    for fewer, full in (
        (" saved, at the pace of what was trained on", "none saved: what was pruned made room"),
        ("The dashed one", "as many samples as a run on everything"),
        ("% fewer", "% passed over"),
        ("That saved about", "That made room for other visits"),
    ):
        assert [fewer in page for page in (run_page, spent)] == [True, False]
        assert [full in page for page in (run_page, spent)] == [False, True]


def test_a_run_with_a_target_set_names_what_is_not_of_its_kind(
    corpus: Path, tmp_path: Path
) -> None:
    examples = tmp_path / "examples.jsonl"
    told = [{"prompt": f"Say {n}.", "completion": "other things " * 9} for n in range(20)]
    examples.write_text("".join(json.dumps(one) + "\n" for one in told))
    embed(corpus, out=tmp_path / "aimed.zarr", dim=64, num_workers=0, target=examples)
    loader = SlapDataLoader(
        StreamingDataset(local=str(corpus), batch_size=16),
        embeddings=str(tmp_path / "aimed.zarr"),
        config=config_of(keep=0.5, steps="full", **FIRM),
        collate_fn=lambda samples: {"n": len(samples)},
        run_dir=tmp_path / "run",
    )
    for batch in loader:
        loader.observe(batch["sample_id"], np.linspace(1.0, 2.0, 16))
    loader.close()
    made = report(tmp_path / "run")
    first = Path(made.page).read_text("utf-8").split('id="cost"')[0]
    assert re.search(r"[1-9]\d* because they are not of the target set", first)
    assert set(EVIDENCE) <= set(_SIGNS)
    assert set(_WHY) == set(OUTCOMES) - {TRAINED, WITHDRAWN}


def test_a_shard_that_is_gone_leaves_out_its_texts_alone(
    corpus: Path, run_dir: Path, tmp_path: Path
) -> None:
    part = Path(shutil.copytree(corpus, tmp_path / "part"))
    sorted(part.glob("shard*.mds"))[0].unlink()
    for made in (
        report(run_dir, corpus=[part], out=tmp_path / "run.html"),
        report(part, out=tmp_path / "corpus.html"),
    ):
        found = [w for w in made.warnings if "texts cannot be shown: their shards" in w]
        assert len(found) == 1
        assert int(found[0].split()[0]) > 0
        page_text = Path(made.page).read_text("utf-8")
        assert "The text cannot be read." in page_text
        assert "word1" in page_text
        assert found[0][:30] in page_text


def test_the_tool_tells_in_json_what_python_does(
    run_dir: Path, made: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    assert main([str(run_dir), "--out", str(out)]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["summary"] == made.summary
    assert Path(told["page"]) == out
