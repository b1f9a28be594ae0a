"""Files that are found whole or not at all, what stands for their content, where they may lie."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slap_stream.errors import ConfigError, CorpusError

# A `Path` has made one slash of two. A single letter is a drive.
_DRIVE = re.compile(r"[A-Za-z]:")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/|$)")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Context of a path to write to, whose file is then found at `path`, whole: old or new,
    whatever ends this process. Nothing is left behind by an error."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file that is found whole, old or new, whatever ends this process."""
    with written_whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def sync_new(path: Path, below: Path) -> None:
    """Wait until a new file is on disk, and found in its folders up to (and with) `below`."""
    for place in (path, *path.parents):
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        if place == below:
            break


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file with `write_text`."""
    write_text(path, writable(json.dumps(value, ensure_ascii=False, indent=1)))


def writable(text: str) -> str:
    """A text as it can be written, shown, and be read as JSON: names of files may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object that `write_json` wrote, or None if it did not get that far.

    Raises:
        CorpusError: If something else is there.
    """
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict):
        raise CorpusError(
            f"{path.name} must be as it was written, an object of JSON, got {str(path)!r}, which "
            f"is none; delete {str(path.parent)!r} and run the same again."
        )
    return manifest


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256, in hex, of the bytes of a file (an index.json, which stands for its dataset)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local_path(
    name: str, path: str | os.PathLike[str], cure: str = "copy it to a local disk first"
) -> Path:
    """A path on a local disk, there or not.

    What names another place would otherwise be made as a folder `s3:`.

    Args:
        name: What the path is called in an error.
        path: As it was given.
        cure: What to do about a path that is not local.

    Raises:
        CorpusError: If it begins with a scheme, or no file can have that name.
    """
    text = os.fspath(path)
    scheme = _SCHEME.match(text)
    if scheme is not None:
        if scheme[1].lower() == "file":
            cure = "leave file:// out"
        raise CorpusError(f"{name} must be a path on a local disk, got {text!r}; {cure}.")
    try:
        # Nothing need be there; but a name may be too long, or hold what no name can hold.
        if not text:
            raise ValueError("an empty name")
        os.stat(text)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CorpusError(f"{name} must be a path that can be, got {text!r} ({reason}).") from error
    return Path(text)


def file_to_write(name: str, path: str | os.PathLike[str]) -> Path:
    """A file that is there and may be replaced, or may be made.

    Args:
        name: What the path is called in an error.
        path: As it was given.

    Raises:
        ConfigError: If it is not local, a directory, in none, or may not be written to.
    """
    try:
        local = local_path(name, path, "write to a local disk, and copy it there")
    except CorpusError as error:
        raise ConfigError(str(error)) from error
    folder, wrong = local.absolute().parent, ""
    if local.is_dir():
        wrong = f"which is a directory; name a file, such as {str(local / 'NAME')!r}"
    elif not folder.is_dir():
        is_file = folder.exists()
        wrong = f"where {str(folder)!r} is {'a file; name another' if is_file else 'missing'}"
        wrong += "" if is_file else "; make it first, or name another"
    elif not all(os.access(one, os.W_OK) for one in (folder, local) if one.exists()):
        wrong = "which may not be written to; name another"
    if wrong:
        raise ConfigError(f"{name} must be a file, new or old, got {str(path)!r}, {wrong}.")
    return local


def path_inside(name: str, directory: Path, told: Any) -> Path:
    """The place of a file that another file names, which lies in that directory or below it.

    Where the directory is part of a hub's cache, whose files are links to its `blobs`, those count.

    Args:
        name: What the file that names it is called in an error.
        directory: That it is relative to.
        told: As it is named there.

    Raises:
        CorpusError: If it is no relative path, or leads elsewhere, be it by a link.
    """
    require_inside(name, told)
    path = directory / str(told)
    if not leads_inside(directory, path):
        raise CorpusError(
            f"{name} must name files inside of {str(directory)!r}, got {told!r}, a link to "
            f"{os.path.realpath(path)!r}; copy that file there."
        )
    return path


def require_inside(name: str, told: Any) -> None:
    """Refuse what is no relative path without a way up, as far as the name says.

    Raises:
        CorpusError: If it is none.
    """
    parts = told.replace("\\", "/").split("/") if isinstance(told, str) else [""]
    if not all(parts) or ".." in parts or "\0" in told or _DRIVE.match(told):
        raise CorpusError(
            f"{name} must name files by relative paths that stay inside of its directory, got "
            f"{told!r}; whoever wrote that may be after other files: do not use it."
        )


def leads_inside(directory: Path, path: Path) -> bool:
    """Whether a path leads into a directory, links followed, or to the blobs of its hub's cache."""
    real = os.path.realpath(path)
    root = os.path.realpath(directory)
    head, snapshots, _ = root.rpartition(f"{os.sep}snapshots{os.sep}")
    roots = [root, os.path.join(head, "blobs")] if snapshots else [root]
    return any(os.path.commonpath([real, inside]) == inside for inside in roots)


def path_to_write(name: str, path: str | os.PathLike[str]) -> Path:
    """A directory that is there and may be written to, or may be made.

    Args:
        name: What the path is called in an error.
        path: As it was given.

    Raises:
        CorpusError: If it is not local, or a file is in its way, or it may not be written to.
    """
    local = local_path(
        name, path, "write to a local disk, and copy it there when it is whole, index.json last"
    )
    there = next(place for place in (local, *local.absolute().parents) if place.exists())
    reason = None if there.is_dir() else "is a file"
    if reason is None and not os.access(there, os.W_OK):
        reason = "may not be written to"
    if reason is not None:
        raise CorpusError(
            f"{name} must be a directory, new or old, that may be written to, got {str(path)!r}, "
            f"where {str(there)!r} {reason}; choose another."
        )
    return local
