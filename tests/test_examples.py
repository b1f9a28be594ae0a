"""The examples run as a newcomer runs them, and their parts do what they say."""

from __future__ import annotations

import gzip
import json
import os
import re
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from slap_stream.cli import embed
from slap_stream.shards.writer import open_writer

EXAMPLES = Path(__file__).parent.parent / "examples"
PNG = b"\x89PNG\r\n\x1a\n"


def run_here(name: str, *arguments: str | Path) -> None:
    """Run an example in this process, which has done the imports that take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    # As Python does for a script that is run from its directory.
    monkeypatch.syspath_prepend(str(EXAMPLES))


def conversation(number: int) -> dict[str, Any]:
    question = f"What is {number} plus {number + 3}, and which word goes with {number * 7}?"
    answer = f"It is {2 * number + 3}, and the word is w{number * 7919 % 997}."
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"source": f"s{number % 2}", "messages": messages}


def test_the_quickstart_needs_no_argument_but_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run_here("01_quickstart.py", "--scale", "0.03", "--out", out)
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    uniform, slap = results["uniform"], results["slap"]
    # Paired: same samples seen, same weights to start with.
    assert uniform["samples"] == slap["samples"]
    assert uniform["losses"][0] == slap["losses"][0]
    assert uniform["losses"][-1] < uniform["losses"][0] - 0.5
    assert results["difference"] == pytest.approx(slap["losses"][-1] - uniform["losses"][-1])
    assert results["verdict"] in printed
    assert f"{slap['losses'][-1]:.3f}" in printed
    assert "$ slap-convert" in printed
    assert "$ slap-embed" in printed
    assert (out / "quickstart.png").read_bytes().startswith(PNG)


WRONG = {
    "01_quickstart.py": {
        "--keep 0": "--keep: must be in (0, 1], got '0'",
        "--scale 0": "--scale: must be a number >= 0.01, got '0'",
        "--corpus {none}": "inputs must exist, got '{none}'",
        "--corpus {file}": "--corpus must hold records to train on, got none in file.jsonl",
    },
    "02_wrap_streaming_dataset.py": {
        "{none} --model {none}": "shards must be a directory with an index.json, got {none}",
        "{none} --model {none} --batch-size 0": "--batch-size: must be a whole number >= 1",
        "{shards} --model {none}": "--model: must be loadable, got '{none}'",
    },
    "03_hf_trainer.py": {
        "--records 9": "--records: must be a whole number >= 200, got '9'",
        "--out {file}": "--out: must be a directory, new or old, that may be written to",
        "--out {none} --records 200": "--save-every: must be at most 8, so that there is a",
    },
    "04_torchrun.py": {
        "--save-every 0": "--save-every: must be a whole number >= 1, got '0'",
        "--keep 2": "--keep: must be in (0, 1], got '2'",
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
        with pytest.raises(SystemExit, match=r"[12]"):
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
        file.writelines(json.dumps(conversation(number)) + "\n" for number in range(600))
        file.write("this line is no JSON\n")
    arguments = ("--corpus", corpus, "--scale", "0.02", "--keep", "0.5", "--out", out)
    run_here("01_quickstart.py", *arguments)
    assert (out / "quickstart.png").read_bytes().startswith(PNG)
    assert "over 64 held-out records" in capsys.readouterr().out
    # A second run may replace the first one, and nothing else.
    (out / ".quickstart").unlink()
    with pytest.raises(SystemExit, match="2"):
        run_here("01_quickstart.py", *arguments)
    assert "--out must be new or of an earlier quickstart" in capsys.readouterr().err
    assert (out / "quickstart.png").exists()


def test_the_quickstart_never_overwrites_what_is_not_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "train.jsonl"
    mine.write_text(json.dumps(conversation(0)) + "\n")
    arguments = ("--corpus", mine, "--out", tmp_path)
    with pytest.raises(SystemExit, match="2"):
        run_here("01_quickstart.py", *arguments)
    assert "--out must be new or of an earlier quickstart" in capsys.readouterr().err
    (tmp_path / ".quickstart").touch()
    with pytest.raises(SystemExit, match="2"):
        run_here("01_quickstart.py", *arguments)
    assert "--corpus must not lie in --out" in capsys.readouterr().err
    assert mine.read_text()


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
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ("--records", "400", "--save-every", "5", "--out", out)
    run_here("03_hf_trainer.py", *arguments)
    printed = capsys.readouterr().out
    # How many records the installed packages' docstrings leave is not the same everywhere.
    taken = re.search(r"taken away after step (\d+) of (\d+)", printed)
    assert taken is not None
    cut, steps = map(int, taken.groups())
    assert 0 < cut < steps
    assert f"step {steps} of {steps}: the last epoch trained on {steps * 8} of" in printed
    with pytest.raises(SystemExit, match="2"):
        run_here("03_hf_trainer.py", *arguments)
    assert "--out: must be new" in capsys.readouterr().err


def test_a_training_goes_on_with_another_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--records", "200", "--save-every", "3", "--out", tmp_path / "run")
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
    trained = re.search(r"trained on (\d+) of (\d+) samples", done.stdout)
    assert trained is not None
    assert int(trained[1]) == int(0.7 * int(trained[2]) // 16) * 16


def test_docstrings_become_questions_of_every_kind() -> None:
    data = import_module("quickstart_data")
    records = data.docstring_records(300, seed=1)
    assert len(records) == 300
    assert {record["source"] for record in records} == {
        "explain",
        "implement",
        "purpose",
        "signature",
    }
    assert len({record["id"] for record in records}) == 300
    for record in records:
        assert [turn["role"] for turn in record["messages"]] == ["user", "assistant"]
        assert all(turn["content"].strip() for turn in record["messages"])
    assert records == data.docstring_records(300, seed=1)


def test_nothing_held_out_occurs_in_training() -> None:
    data = import_module("quickstart_data")
    originals = [conversation(number) for number in range(300)]
    # Every record twice, once under another source and with a word changed.
    copies = [
        json.loads(json.dumps(record).replace("and which", "but which")) for record in originals
    ]
    train, heldout = data.split(originals + copies, num_train=300, num_heldout=64, seed=3)
    assert len(train) == 300
    answers = [data.answer_of(record) for record in heldout]
    assert len(set(answers)) == len(answers) == 64
    assert not set(answers) & {data.answer_of(record) for record in train}


def test_a_corpus_of_copies_leaves_nothing_to_hold_out() -> None:
    with pytest.raises(ValueError, match="at least 50 records to hold out, got 0 of 200"):
        import_module("quickstart_data").split(
            [conversation(1)] * 200, num_train=100, num_heldout=64, seed=0
        )


@pytest.mark.parametrize("sources", [1, 3])
def test_the_figure_draws_what_there_is(tmp_path: Path, sources: int) -> None:
    figure = import_module("quickstart_figure")
    groups = [figure.Group(name="a", offered=100, kept={"uniform": 70, "slap": 50})]
    figure.draw(
        tmp_path / "figure.png",
        title="A title",
        verdict="A verdict",
        keep=0.7,
        curves=[
            figure.Curve(name=name, samples=[0, 8, 16], losses=[7.0, 6.0, 5.0])
            for name in ("uniform", "slap")
        ],
        strata=[groups] * sources,
        kinds=[groups, []],
    )
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG)
