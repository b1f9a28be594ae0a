"""A folder of results that may lie elsewhere: written locally, uploaded, made whole last of all."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from slap_stream.core.files import path_to_write
from slap_stream.errors import CorpusError, RemoteError
from slap_stream.remote.bucket import delete, download, list_below, put, side_by_side
from slap_stream.remote.cache import scratch
from slap_stream.remote.urls import WRITABLE, Url, is_remote, parse_url

# Lies beside half-uploaded results, and says of what.
CLAIM_NAME = "_slap_upload.json"
_LOCK_NAME = "lock"


class Output:
    """Where results go; made by `output_to`.

    A local folder is written to as it is. For one elsewhere there is a work directory: what is
    written there is uploaded by `publish`, with the file that makes it whole last. A kill at any
    moment leaves what the same call goes on with; nobody takes half of it for all of it.

    State of an upload, all on disk and in the store: the claim beside the results, and the journal
    of files that have arrived.

    Args:
        local: The local folder, or the work directory.
        url: Where the results go; None: they stay.
        last: Name of the file that makes them whole.

    Attributes:
        local: Where to write.
        url: Where the results go; None: they stay.
    """

    def __init__(self, local: Path, url: Url | None, last: str) -> None:
        self.url, self._last = url, last
        self._work_dir = local
        self.local = local if url is None else local / "out"
        self._lock: FileLock | None = None

    def __str__(self) -> str:
        return str(self.local if self.url is None else self.url)

    def described(self, *names: str) -> dict[str, bytes] | None:
        """These files of results that are whole elsewhere; None if they are not, or local."""
        if self.url is None or download(self.url.below(self._last)) is None:
            return None
        found = {name: download(self.url.below(name)) for name in names}
        return {name: data for name, data in found.items() if data is not None}

    def claim(self, identity: Any, *, overwrite: bool = False) -> None:
        """Say elsewhere what will come, so that nothing else is mixed with it.

        Args:
            identity: All that decides what the results will be, in kinds that JSON has.
            overwrite: Whether they may take the place of others that are whole, or claimed; what
                these are the caller has looked at.

        Raises:
            CorpusError: If something else is there.
            RemoteError: If the store cannot be reached.
        """
        if self.url is None:
            return
        told = json.dumps({"results": identity}, sort_keys=True).encode()
        claim = self.url.below(CLAIM_NAME)
        held = download(claim)
        if held != told:
            files = [self._name(file.url) for file in list_below(self.url)]
            replaceable = overwrite and (held is not None or self._last in files)
            if not replaceable and (held is not None or files):
                what = "half-uploaded results of another call" if held else f"{files[:5]!r}"
                raise CorpusError(
                    f"out must be new, empty or left by the same call, got {str(self)!r} with "
                    f"{what} ({len(files)} files in all); delete them, or choose another place."
                )
        self._hold()
        if self._claimed() != told:
            # What another call has written or uploaded is not this one's.
            for left in [path for path in self._work_dir.iterdir() if path.name != _LOCK_NAME]:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            self._claim.write_bytes(told)
        if held != told:
            # Whoever may not write finds out now, and not when all work is done.
            put(told, claim)

    def publish(self, *, progress: bool | None = None) -> None:
        """Upload what was written, wait for it, make it whole; then remove the work directory.

        Raises:
            CorpusError: If the place is no longer claimed for these results.
            RemoteError: If the store cannot be reached; what has arrived is kept.
        """
        if self.url is None:
            return
        self._hold()
        self._require_claimed()
        sizes = {
            path.relative_to(self.local).as_posix(): path.stat().st_size
            for path in sorted(self.local.rglob("*"))
            if path.is_file()
        }
        there = {self._name(file.url): file for file in list_below(self.url)}
        if self._last in there:
            # Results that are replaced are no longer whole from now on.
            delete(self.url.below(self._last))
        for name in there.keys() - sizes.keys() - {CLAIM_NAME}:
            delete(self.url.below(name))
        arrived = self._arrived()
        missing = [
            name
            for name, size in sizes.items()
            if name != self._last
            and not (
                name in there
                and (there[name].num_bytes, there[name].version) == (size, arrived.get(name))
            )
        ]
        total = sum(sizes[name] for name in missing)
        with (
            tqdm(
                desc="upload",
                unit="B",
                unit_scale=True,
                total=total,
                disable=None if progress is None else not progress,
            ) as bar,
            self._journal.open("a", encoding="utf-8") as journal,
        ):

            def upload(name: str, url: Url = self.url) -> tuple[str, str]:
                return name, put(self.local / name, url.below(name))

            for name, version in side_by_side(upload, missing):
                journal.write(json.dumps([name, version]) + "\n")
                journal.flush()
                bar.update(sizes[name])
        self._require_arrived({name: n for name, n in sizes.items() if name != self._last})
        put(self.local / self._last, self.url.below(self._last))
        self.close()

    def close(self) -> None:
        """Remove what is left of the work on results that are whole elsewhere."""
        if self.url is None:
            return
        if self._lock is None and self._work_dir.is_dir():
            try:
                self._hold()
            except CorpusError:
                # They are being replaced.
                return
        claim = self.url.below(CLAIM_NAME)
        # Who may only read may ask for what is finished, too.
        if download(claim) is not None:
            delete(claim)
        shutil.rmtree(self._work_dir, ignore_errors=True)
        if self._lock is not None:
            self._lock.release(force=True)

    def _hold(self) -> None:
        """Keep other processes of this machine out of the work directory, until this one ends."""
        if self._lock is not None:
            return
        self._work_dir.mkdir(parents=True, exist_ok=True)
        # One for this process: what it holds from a call that failed it may go on with.
        lock = FileLock(self._work_dir / _LOCK_NAME, is_singleton=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise CorpusError(
                f"out must not be in use, got {str(self)!r}, which another process is writing from "
                f"{str(self._work_dir)!r}; wait for it, or stop it."
            ) from error
        self._lock = lock

    def _require_claimed(self) -> None:
        """Leave what is there alone if it is another call's by now."""
        assert self.url is not None
        held = download(self.url.below(CLAIM_NAME))
        if held is None or held != self._claimed():
            what = "no claim" if held is None else "that of another call"
            raise CorpusError(
                f"out must be claimed by this call until it has ended, got {str(self)!r} with "
                f"{what}; run the same again, which goes on, or says what is in the way."
            )

    @property
    def _claim(self) -> Path:
        return self._work_dir / "claim.json"

    def _claimed(self) -> bytes | None:
        """What the work directory is for; None if nobody has said it."""
        return self._claim.read_bytes() if self._claim.is_file() else None

    @property
    def _journal(self) -> Path:
        return self._work_dir / "uploaded.jsonl"

    def _arrived(self) -> dict[str, str]:
        """Version of each file that an earlier call has uploaded."""
        arrived: dict[str, str] = {}
        if self._journal.is_file():
            for line in self._journal.read_text("utf-8").splitlines():
                # The last one may have been cut short.
                with suppress(ValueError):
                    name, version = json.loads(line)
                    arrived[name] = version
        return arrived

    def _require_arrived(self, sizes: dict[str, int]) -> None:
        assert self.url is not None
        there = {self._name(file.url): file.num_bytes for file in list_below(self.url)}
        wrong = [name for name, size in sizes.items() if there.get(name) != size]
        if wrong:
            raise RemoteError(
                f"all files must have arrived, got {len(wrong)} of {len(sizes)} missing or cut "
                f"short in {str(self)!r}, first {wrong[:5]!r}; run the same again."
            )

    def _name(self, url: Url) -> str:
        assert self.url is not None
        return url.key[len(self.url.key) :].strip("/")


def output_to(
    name: str, place: str | os.PathLike[str], scratch_dir: str | Path | None, *, last: str
) -> Output:
    """Where results go that are asked for at a place.

    Args:
        name: What the place is called in an error.
        place: A local folder, or a URL.
        scratch_dir: Where to work for a URL; None: a folder of this user's in the one for temporary
            files, the same for the same URL.
        last: Name of the file that makes the results whole.

    Raises:
        CorpusError: If nothing can be written there.
    """
    if not is_remote(place):
        if scratch_dir is not None:
            raise CorpusError(
                f"scratch_dir must be None for a local {name}, got {str(scratch_dir)!r}; the work "
                "is done where its results will be."
            )
        return Output(path_to_write(name, place), None, last)
    check_output(name, place)
    url = parse_url(name, place)
    root = None if scratch_dir is None else path_to_write("scratch_dir", scratch_dir)
    return Output(scratch("work", str(url), root), url, last)


def check_output(name: str, place: str | os.PathLike[str]) -> None:
    """Refuse a place that nothing can be written to.

    Raises:
        CorpusError: If it is a file, is not to be written to, or of a kind that is only read.
    """
    if not is_remote(place):
        path_to_write(name, place)
        return
    url = parse_url(name, place)
    if url.scheme not in WRITABLE:
        raise CorpusError(
            f"{name} must be a local path or begin with one of "
            f"{', '.join(f'{scheme}://' for scheme in WRITABLE)}, got {str(url)!r}; that can only "
            "be read."
        )
    if not url.key:
        raise CorpusError(
            f"{name} must name a folder of a bucket, got {str(url)!r}; write {url}/corpus."
        )
