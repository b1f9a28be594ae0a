"""The tools' manners: what is wrong is said in one line, and an interrupt is no traceback."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from importlib import import_module
from pathlib import Path

import pytest

from slap_stream import __version__
from slap_stream.cli.command_line import ended, in_own_process
from slap_stream.errors import CorpusError

# Of each tool: arguments that are wrong, and what is said of them. {here} is a directory, {file} a
# file in it.
WRONG = {
    "tools.bench.probe": {
        "--refreshes 0": "--refreshes: must be a whole number >= 1, got '0'",
        "--batch-size 0": "--batch-size: must be a whole number >= 1, got '0'",
        "--layers many": "--layers: must be a whole number >= 1, got 'many'",
        "--hidden 65": "--hidden: must be a multiple of 64, or even and below, got 65",
        "--device tpu": "--device: must be one of torch's, got 'tpu'",
        "--device cuda:99": "--device: must be here, got 'cuda:99' on a machine with ",
    },
    "tools.bench.composer": {
        "--repeats 0": "--repeats: must be a whole number >= 1, got '0'",
        "--warmup -1": "--warmup: must be a whole number >= 0, got '-1'",
        "--keep 7": "--keep: must be in (0, 1], got '7'",
        "--keep nan": "--keep: must be in (0, 1], got 'nan'",
        "--policy best": "policy must be one of slap, ",
        "--sizes 1e9 2.5": "--sizes: must be a whole number >= 1, got '2.5'",
        "--samples 365": "--samples: must be at least 366, which make one batch of 256",
        "--memory --sizes 1e9 9": "--sizes: must be at least 366, which make one batch of 256",
        "--steps 15": "--steps: must be at least 16, one of which refreshes, got 15",
    },
    "tools.bench.loader": {
        "--rounds 0": "--rounds: must be a whole number >= 1, got '0'",
        "--workers 2 -1": "--workers: must be a whole number >= 0, got '-1'",
        "--corpora long": "--corpora: invalid choice: 'long' (choose from ",
        "--arms best": "--arms: invalid choice: 'best' (choose from ",
        "--samples 767": "--samples: must be a whole number >= 768, got '767'",
        "--seconds 0": "--seconds: must be a number > 0, got '0'",
        "--data {file}": "--data: must be a directory, new or old, that may be written to",
        "--data {file}/new": "--data: must be a directory, new or old, that may be written to",
    },
    "tools.bench.ranks": {
        "--ranks 0": "--ranks: must be a whole number >= 1, got '0'",
        "--ranks 3": "ranks must divide lanes, got 3 ranks of 8 lanes",
        "--lane-batch 0": "--lane-batch: must be a whole number >= 1, got '0'",
        "--lane-batch 9999": "lane-batch must be at most 3500, so that 8 lanes have a batch, got",
        "--steps 16": "--steps: must be a whole number >= 64, got '16'",
    },
    "tools.bench.selection": {
        "": "the following arguments are required: --data",
        "--data {here}/none": "--data: must be a directory, got ",
        "--data {here} --out {file}": "--out: must be a directory, new or old, that may be",
        "--data {here} --arms best": "arms must be of full, ",
        "--data {here} --conditions best": "condition must be one of balanced",
        "--data {here} --set foo=1": "set must be NAME=VALUE of keep, keep_min, ",
        "--data {here} --set probe_fraction=abc": "must be a finite number, got 'abc'",
        "--data {here} --keep 2": "--keep: must be in (0, 1], got '2'",
        "--data {here} --learning-rate 0": "--learning-rate: must be a number > 0, got '0'",
        "--data {here} --seeds 0": "--seeds: must be a whole number >= 1, got '0'",
        "--data {here} --jobs 0": "--jobs: must be a whole number >= 1, got '0'",
        "--data {here} --first-seed -1": "--first-seed: must be a whole number >= 0, got '-1'",
        "--data {here} --out {here}/new --report": "out must hold results, got none in ",
    },
}


@pytest.mark.parametrize("tool", WRONG)
def test_a_wrong_argument_is_one_line(
    tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    package = tool in ("tools.bench.composer", "tools.bench.loader", "tools.bench.selection")
    main = import_module(f"{tool}.__main__" if package else tool).main
    for arguments, said in WRONG[tool].items():
        with pytest.raises(SystemExit, match=r"^2$"):
            main(arguments.format(here=tmp_path, file=file).split())
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{tool}: ")
        assert said in line
        assert line.endswith("; see --help.")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_errors_and_interrupts_are_told_and_bugs_are_not_hidden(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(error: BaseException) -> int:
        raise error

    assert ended("tool", lambda: 0) == 0
    assert capsys.readouterr().err == ""
    assert ended("tool", lambda: failing(CorpusError("a must be b, got c."))) == 1
    assert capsys.readouterr().err == "tool: a must be b, got c.\n"
    assert ended("tool", lambda: failing(OSError("disk full"))) == 1
    assert capsys.readouterr().err == "tool: disk full\n"
    assert ended("tool", lambda: failing(OSError("disk full")), debug=True) == 1
    traced = capsys.readouterr().err
    assert "in failing\n" in traced
    assert traced.endswith("tool: disk full\n")
    assert ended("tool", lambda: failing(KeyboardInterrupt()), interrupted="stopped") == 130
    assert capsys.readouterr().err == "tool: stopped.\n"
    with pytest.raises(ZeroDivisionError):
        ended("tool", lambda: 1 // 0)


@pytest.mark.parametrize("tool", ["convert", "embed", "report"])
def test_the_tools_of_the_package_are_used_alike(
    tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = import_module(f"slap_stream.cli.{tool}").main
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--help"])
    told = capsys.readouterr().out
    assert f"examples:\n  slap-{tool} " in told
    assert "--quiet, --json" in told
    out = [str(tmp_path / "corpus")] if tool == "convert" else []
    for debug in ([], ["--debug"]):
        assert main([str(tmp_path / "none"), *out, "--json", *debug]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.splitlines()[-1].startswith(f"slap-{tool}: ")
        assert ("Traceback" in said.err) == bool(debug)


def test_the_tools_of_the_package_tell_people_and_programs_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"text": f"A text of its own, number {number}."} for number in range(8)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    corpus = str(tmp_path / "corpus")
    for tool, arguments, again in (
        ("convert", [str(tmp_path / "in.jsonl"), corpus, "--num-workers", "0"], []),
        ("embed", [corpus, "--num-workers", "0"], ["--overwrite"]),
        ("report", [corpus], []),
    ):
        main = import_module(f"slap_stream.cli.{tool}").main
        with pytest.raises(SystemExit, match=r"^0$"):
            main(["--version"])
        assert capsys.readouterr().out == f"slap-{tool} {__version__}\n"
        assert main(arguments) == 0
        said = capsys.readouterr()
        *table, last = said.out.splitlines()
        assert "8" in " ".join(table)
        told = json.loads(last)
        assert "\033" not in said.out + said.err
        assert main([*arguments, *again, "--json"]) == 0
        said = capsys.readouterr()
        [line] = said.out.splitlines()
        assert json.loads(line).keys() == told.keys()
        assert said.err == ""


def test_a_reader_that_has_seen_enough_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in `slap-report trained | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        assert ended("tool", lambda: print("a" * 100_000) or 0) == 1
        # Nor is there one when the interpreter ends, and writes out what is left.
        pipe.flush()
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("debug", [False, True])
def test_a_pipe_that_broke_and_is_not_the_output_is_an_error(
    debug: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ended with 1 and not a word."""
    here, there = socket.socketpair()
    there.close()
    with here:
        assert ended("tool", lambda: here.send(b"x"), debug=debug) == 1
    said = capsys.readouterr().err
    assert said.endswith("tool: [Errno 32] Broken pipe\n")
    assert ("Traceback" in said) == debug


def test_what_a_process_found_or_why_it_failed_is_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, warnings\n"
        "warnings.warn('old')\n"
        "print('some words')\n"
        "print(sys.argv[1])\n"
        "sys.exit(sys.argv[2] or 0)\n"
    )
    assert in_own_process("arm", "script", [json.dumps({"a": 1}), ""]) == {"a": 1}
    with pytest.raises(
        ChildProcessError, match=r"^arm must run to its end, ended with 1: no luck$"
    ):
        in_own_process("arm", "script", ["{}", "no luck"])


def test_an_interrupted_process_puts_away_what_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script, made = tmp_path / "script.py", tmp_path / "made"
    script.write_text(
        "import os, pathlib, sys, time\n"
        "made = pathlib.Path(sys.argv[1])\n"
        "try:\n"
        "    made.write_text(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "finally:\n"
        "    time.sleep(0.5)\n"
        "    made.unlink()\n"
    )

    def interrupt() -> None:
        while not made.exists() or not made.read_text():
            time.sleep(0.01)
        # As a terminal does: all of its processes.
        for process in (int(made.read_text()), os.getpid()):
            os.kill(process, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        in_own_process("arm", "script", [str(made)])
    thread.join()
    assert not made.exists()


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("convert", "ftp://host/in.jsonl out"),
        ("convert", "in.jsonl dbfs:/corpus"),
        ("convert", "in.jsonl https://host/corpus"),
        ("convert", "in.jsonl s3://bucket"),
        ("embed", "oci://bucket/corpus"),
        ("embed", "corpus --out hf://datasets/a/b"),
        ("embed", "corpus --out out --scratch-dir scratch"),
    ],
)
def test_a_place_that_cannot_be_served_is_refused_before_any_work(
    tool: str,
    arguments: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # They returned 0 and had made a folder `s3:`.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "index.json").write_text('{"version": 2, "shards": []}')
    main = import_module(f"slap_stream.cli.{tool}").main
    try:
        status = main(arguments.split())
    except SystemExit as end:
        status = end.code
    assert status in (1, 2)
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(r"must (be a (path on a )?local|name a folder|be None for a local)", line)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "in.jsonl"]
