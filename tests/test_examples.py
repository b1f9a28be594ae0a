"""The examples run as a newcomer runs them, and their parts do what they say."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from slap_stream.cli import embed
from slap_stream.errors import CorpusError
from slap_stream.shards.writer import open_writer

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_here(name: str, *arguments: str | Path) -> None:
    """Run an example in this process, which has done the imports that take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A small quickstart: the folder that it leaves, and what it prints."""
    out = tmp_path_factory.mktemp("examples") / "quickstart"
    printed = io.StringIO()
    with redirect_stdout(printed):
        run_here("01_quickstart.py", "--samples", "200", "--out", out)
    return out, printed.getvalue()


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    """What the quickstart is made of."""
    return runpy.run_path(str(EXAMPLES / "01_quickstart.py"))


def rows(printed: str) -> dict[str, list[float]]:
    """Held-out loss, samples, copies in percent and seconds of each run, as printed."""
    found = re.findall(r"^(\w+) +([\d.]+) +([\d,]+) +(\d+)% +([\d.]+)$", printed, re.MULTILINE)
    return {name: [float(n.replace(",", "")) for n in numbers] for name, *numbers in found}


def conversation(number: int) -> dict[str, Any]:
    question = f"What is {number} plus {number + 3}, and which word goes with {number * 7}?"
    answer = f"It is {2 * number + 3}, and the word is w{number * 7919 % 997}."
    # What is the same in all of them must not make copies of them.
    system = (
        "You are a machine that adds up two numbers, and that always knows which word is asked."
    )
    turns = {"system": system, "user": question, "assistant": answer}
    messages = [{"role": role, "content": content} for role, content in turns.items()]
    return {"source": f"s{number % 2}", "messages": messages}


def test_the_quickstart_needs_no_argument_but_time(quickstart: tuple[Path, str]) -> None:
    out, printed = quickstart
    commands = ["slap-convert", "slap-convert", "slap-embed", "slap-report"]
    assert re.findall(r"^\$ (\S+)", printed, re.MULTILINE) == commands
    runs = rows(printed)
    assert list(runs) == ["everything", "slap", "uniform"]
    assert runs["everything"][1] == 4 * 192
    assert runs["slap"][1] - 4 * 16 < runs["uniform"][1] <= runs["slap"][1] <= 4 * 192
    # The documentation repeats itself, so that there is something to prune; all have learnt. (How
    # much of it there is depends on what other tests have loaded.)
    assert runs["everything"][2] > 10
    assert all(0 < loss < math.log(1024) for loss, *_ in runs.values())
    for name, change in re.findall(r"slap against (\w+): ([+-][\d.]+)", printed):
        difference = runs["slap"][0] - runs[name][0]
        assert float(change) == pytest.approx(difference, abs=0.0011)
    assert (out / "train" / "embeddings.zarr").is_dir()
    # The report is of slap's run, whole, and where it is said to be.
    [page] = re.findall(r"^Open (\S+) in a browser\.$", printed, re.MULTILINE)
    assert page == str(out / "slap" / "_slap_report.html")
    assert Path(page).read_text().startswith("<!doctype html>")
    [told] = re.findall(r'^(\{"kind": "run".*)$', printed, re.MULTILINE)
    summary = json.loads(told)["summary"]
    assert summary["candidates"] == 4 * 200
    assert summary["trained"] == runs["slap"][1]


WRONG = {
    "01_quickstart.py": {
        "--samples 9": "--samples: must be a whole number >= 100, got '9'",
        "--corpus {none}": "--corpus must be a file and not in --out, which is overwritten, got",
    },
    "02_wrap_streaming_dataset.py": {
        "{none} --model {none}": "shards must be a directory with an index.json, got {none}",
        "{none} --model {none} --batch-size 0": "--batch-size: must be a whole number >= 1",
        "{shards} --model {none}": "--model: must be loadable, got '{none}'",
    },
    "03_hf_trainer.py": {
        "--keep 2": "--keep: must be in (0, 1], got '2'",
        "--out {file}": "--out: must be a directory, new or old, that may be written to",
        "--data {none}": "--data must be what 01_quickstart.py made, got {none}; run it first",
    },
    "04_torchrun.py": {
        "--save-every 0": "--save-every: must be a whole number >= 1, got '0'",
        "--data {none}": "--data must be what 01_quickstart.py made, got {none}; run it first",
    },
}


@pytest.mark.parametrize("example", WRONG)
def test_a_wrong_argument_is_one_line(
    example: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {name: tmp_path / name for name in ("none", "shards")}
    places["file"] = tmp_path / "file.jsonl"
    places["file"].write_text('{"a": 1}\n')
    places["shards"].mkdir()
    (places["shards"] / "index.json").touch()
    for arguments, said in WRONG[example].items():
        with pytest.raises(SystemExit, match="2"):
            run_here(example, *arguments.format(**places).split())
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{example}: ")
        assert said.format(**places) in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.jsonl", "shards"]


def test_the_quickstart_takes_a_corpus_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, out = tmp_path / "mine.jsonl.gz", tmp_path / "run"
    with gzip.open(corpus, "wt") as file:
        file.writelines(json.dumps(conversation(number)) + "\n" for number in range(300))
        file.write("this line is no JSON\n")
    arguments = ("--corpus", corpus, "--samples", "100", "--out", out)
    run_here("01_quickstart.py", *arguments)
    printed = capsys.readouterr().out
    assert '"dropped": {"line that is not JSON": 1}' in printed
    assert "100 records to train on, 200 held out" in printed
    assert rows(printed)["everything"][1:3] == [4 * 96, 0]
    # A second run may replace the first one, and nothing else.
    (out / ".quickstart").unlink()
    with pytest.raises(SystemExit, match="2"):
        run_here("01_quickstart.py", *arguments)
    assert "--out must be new or of an earlier quickstart" in capsys.readouterr().err
    assert (out / "train" / "index.json").exists()


def test_the_quickstart_never_overwrites_what_is_not_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "train.jsonl"
    mine.write_text(json.dumps(conversation(0)) + "\n")
    with pytest.raises(SystemExit, match="2"):
        run_here("01_quickstart.py", "--out", tmp_path)
    assert "--out must be new or of an earlier quickstart" in capsys.readouterr().err
    (tmp_path / ".quickstart").touch()
    with pytest.raises(SystemExit, match="2"):
        run_here("01_quickstart.py", "--corpus", mine, "--out", tmp_path)
    assert "--corpus must be a file and not in --out" in capsys.readouterr().err
    assert mine.read_text()


def test_the_documentation_is_a_page_for_each_public_name(
    quickstart: tuple[Path, str],  # has loaded the libraries, as that of a newcomer does
    parts: dict[str, Any],
) -> None:
    records = list(parts["docstrings"](420, seed=1))
    assert {record["source"] for record in records} == set(parts["LIBRARIES"])
    assert len(records) == len({record["id"] for record in records}) == 420
    for record in records:
        question, answer = (turn["content"] for turn in record["messages"])
        name = record["id"].rpartition(".")[2]
        assert not name.startswith("_")
        assert question.startswith(f"What does {name}(")
        assert 60 <= len(answer) <= 200


def test_nothing_held_out_occurs_in_training(parts: dict[str, Any]) -> None:
    originals = [conversation(number) for number in range(300)]
    # Every record twice, once with a word changed.
    copies = [json.loads(json.dumps(record).replace("It is", "It was")) for record in originals]
    train, heldout = parts["split"](originals + copies, 300, seed=3)
    assert len(train) == 300
    assert len(heldout) >= 50
    sums = [re.findall(r"\d+,", parts["answer_of"](record))[0] for record in heldout]
    assert len(set(sums)) == len(sums)
    assert not set(sums) & {re.findall(r"\d+,", parts["answer_of"](r))[0] for r in train}


def test_a_corpus_of_copies_leaves_nothing_to_hold_out(parts: dict[str, Any]) -> None:
    with pytest.raises(CorpusError, match="must leave 50 new answers to hold out, got 0;"):
        parts["split"]([conversation(1)] * 200, 100, seed=0)


def test_someone_elses_shards_are_trained_on_and_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.text.test_chat import CHATML, byte_level

    shards, model = tmp_path / "shards", tmp_path / "model"
    with open_writer(shards, {"body": "str", "label": "int"}, shard_bytes=4_000) as writer:
        for number in range(160):
            writer.write(
                {"body": f"Document {number}: {'the lazy dog ' * (number % 5 + 1)}", "label": 0}
            )
    assert embed.main([str(shards), "--text-column", "body", "--quiet"]) == 0
    tokenizer = byte_level(CHATML)
    tokenizer.save_pretrained(model)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(model)
    arguments = (
        *(shards, "--model", model, "--text-column", "body", "--batch-size", "8"),
        *("--num-workers", "0", "--save-every", "5", "--out", tmp_path / "out"),
    )
    for column in ("nope", "label"):
        with pytest.raises(SystemExit, match="2"):
            run_here("02_wrap_streaming_dataset.py", *arguments, "--text-column", column)
        said = f"--text-column: must be one of ['body'], got '{column}'"
        assert said in capsys.readouterr().err
    run_here("02_wrap_streaming_dataset.py", *arguments)
    printed = capsys.readouterr().out
    assert "step 14  100%" in printed
    assert "trained on 112 of 160 samples" in printed
    run_here("02_wrap_streaming_dataset.py", *arguments)
    printed = capsys.readouterr().out
    assert "going on after step 14" in printed
    assert "step 15" not in printed


def test_a_hugging_face_training_is_broken_off_and_goes_on(
    quickstart: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--data", quickstart[0], "--out", tmp_path / "run")
    run_here("03_hf_trainer.py", *arguments)
    printed = capsys.readouterr().out
    assert "taken away after step 12 of 16" in printed
    assert "step 16 of 16: the last epoch trained on 128 of 200 samples" in printed
    with pytest.raises(SystemExit, match="2"):
        run_here("03_hf_trainer.py", *arguments)
    assert "--out must be new" in capsys.readouterr().err


def test_a_training_goes_on_with_another_number_of_processes(
    quickstart: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--data", quickstart[0], "--save-every", "3", "--out", tmp_path / "run")
    # What the example sets for one process, so that it is taken back.
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    run_here("04_torchrun.py", *arguments, "--stop-after", "4")
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [sys.executable, *torchrun, EXAMPLES / "04_torchrun.py", *arguments, "--fsdp"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on after step 3 on 2 processes" in done.stdout
    assert "trained on 128 of 200 samples" in done.stdout
