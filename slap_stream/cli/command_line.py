"""Command lines of all tools: arguments that are checked, errors of one line."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

from slap_stream import __version__
from slap_stream.core.files import local_path, path_to_write
from slap_stream.errors import ConfigError, CorpusError, SlapStreamError
from slap_stream.remote.output import check_output

WRONG_ARGUMENT, INTERRUPTED = 2, 130
# What a process that was interrupted may take to put away what it made.
_SECONDS_TO_END = 10.0


class CommandLine(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, and nothing else."""

    def error(self, message: str) -> NoReturn:
        """End the program."""
        self.exit(WRONG_ARGUMENT, f"{self.prog}: {message.rstrip('.')}; see --help.\n")


def whole(least: int) -> Callable[[str], int]:
    """The type of an argument that counts something, such as 4 or 1e9."""

    def number(text: str) -> int:
        value = _number(text)
        if not (value >= least and value == int(value)):
            raise argparse.ArgumentTypeError(f"must be a whole number >= {least}, got {text!r}")
        return int(value)

    return number


def real(least: float, *, above: bool = False) -> Callable[[str], float]:
    """The type of an argument that measures something: at least, or above, a bound."""

    def number(text: str) -> float:
        value = _number(text)
        if not (value > least or (value == least and not above)):
            sign = ">" if above else ">="
            raise argparse.ArgumentTypeError(f"must be a number {sign} {least:g}, got {text!r}")
        return value

    return number


def share(text: str) -> float:
    """The type of an argument that is a part of a whole."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text!r}")
    return value


def _number(text: str) -> float:
    """NaN for what is no finite number: it is neither above nor below anything."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def device(text: str) -> str:
    """The type of an argument that names one of torch's devices, which is here."""
    from slap_stream.embeddings.pretrained import torch_device

    try:
        torch_device(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("device ")) from error
    return text


def directory(text: str) -> Path:
    """The type of an argument that names a directory to read from."""
    if not _told(local_path, text).is_dir():
        raise argparse.ArgumentTypeError(f"must be a directory, got {text!r}")
    return Path(text)


def to_write(text: str) -> Path:
    """The type of an argument that names a directory to write to, made when it is needed."""
    return _told(path_to_write, text)


def output(text: str) -> str:
    """The type of an argument that names a directory or a URL to write to."""
    try:
        check_output("", text)
    except CorpusError as error:
        raise argparse.ArgumentTypeError(str(error).strip()) from error
    return text


def _told(check: Callable[[str, str], Path], text: str) -> Path:
    try:
        return check("", text)
    except CorpusError as error:
        raise argparse.ArgumentTypeError(str(error).strip()) from error


def add_common(line: argparse.ArgumentParser, *, quiet: str) -> None:
    """Add what all tools of the package have.

    Args:
        line: The tool's parser.
        quiet: What it leaves out when it prints a line of JSON only.
    """
    line.add_argument(
        "--quiet",
        "--json",
        action="store_const",
        const=False,
        dest="progress",
        help=f"{quiet}: only the line of JSON",
    )
    line.add_argument("--debug", action="store_true", help="show where an error comes from")
    line.add_argument("--version", action="version", version=f"{line.prog} {__version__}")


class _NobodyReadsError(BrokenPipeError):
    """Nobody reads standard output any more; other pipes that break are errors to be told."""


class _Stdout:
    """Standard output, whose own end is told from that of other pipes and sockets."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError as error:
            raise _NobodyReadsError(*error.args) from error

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError as error:
            raise _NobodyReadsError(*error.args) from error


def ended(
    program: str,
    run: Callable[[], int],
    *,
    interrupted: str = "interrupted",
    debug: bool = False,
) -> int:
    """Run a tool to its end; what it must expect to go wrong is told in one line.

    Args:
        program: Its name.
        run: Does its work.
        interrupted: What is said after an interrupt.
        debug: Whether to show where an error comes from, too.

    Returns:
        The exit status: 1 after an error, 130 after an interrupt. (A wrong argument is 2.)
    """
    try:
        with redirect_stdout(cast(Any, _Stdout(sys.stdout))):
            status = run()
            # Here: what cannot be printed at the interpreter's end is a traceback.
            sys.stdout.flush()
        return status
    except _NobodyReadsError:
        # Whoever read it (`| head`) has seen enough; what is left would be tried once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (SlapStreamError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if interrupted:
            print(f"{program}: {interrupted}.", file=sys.stderr)
        return INTERRUPTED


def in_own_process(name: str, module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run a module in a process of its own; what its last line says in JSON.

    Raises:
        ChildProcessError: If it fails, with what it said last.
    """
    # Warnings of libraries are no part of what is measured.
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as child:
        try:
            said, complaint = child.communicate()
        except BaseException:
            # A terminal interrupts all of its processes; only this one may have been, too.
            try:
                child.communicate(timeout=_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                child.kill()
            raise
    if child.returncode:
        raise ChildProcessError(
            f"{name} must run to its end, ended with {child.returncode}: "
            f"{complaint.strip()[-2000:] or 'it said nothing'}"
        )
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found
