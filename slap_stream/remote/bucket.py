"""Requests to object stores and the web: each tried again for a while, then one clear error.

Time-outs, resets, answers that are cut short, errors of the server and expired credentials look
alike from outside and may all be over in a moment. So everything is tried again, with clients and
credentials made anew, but for what says that a file is missing or has changed.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Protocol, TypeVar

from slap_stream.errors import RemoteError
from slap_stream.remote.urls import Url

logger = logging.getLogger(__name__)

# As for shards: with the backoff, which doubles, a quarter of a minute.
ATTEMPTS = 6
BACKOFF_SECONDS = 0.5
DEADLINE_SECONDS = 600.0
# Of one request with its answer, of at most `PART_BYTES`.
REQUEST_SECONDS = 60.0
PART_BYTES = 8 << 20
_CONNECT_SECONDS = 10.0
# Requests at the same time.
_THREADS = 8

# Trying again does not mend a program.
_BUGS = (
    TypeError,
    AttributeError,
    NameError,
    LookupError,
    AssertionError,
    NotImplementedError,
    MemoryError,
)
_SECRETS = re.compile(r"\?\S+|//[^/\s@]+@")

_CODES = re.compile(r"<Code>(\w+)</Code>|\bkind: ([A-Z]\w+)")

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as its store describes it.

    Attributes:
        url: Where it is.
        num_bytes: Its size.
        version: Changes when it does: a hash, or a time; "" if the store tells neither.
    """

    url: Url
    num_bytes: int
    version: str


class Changed(Exception):
    """A file is not the one that was described."""


class _Client(Protocol):
    """What is asked of a store; each call is one request, or a listing."""

    def describe(self, url: Url) -> RemoteFile: ...

    def list(self, url: Url) -> list[RemoteFile]: ...

    def read(self, url: Url, start: int, stop: int, version: str) -> bytes: ...

    def put(self, source: Path | bytes, url: Url) -> str: ...

    def delete(self, url: Url) -> None: ...


def describe(url: Url) -> RemoteFile:
    """Size and version of a file.

    Raises:
        RemoteError: If it is not there, or cannot be reached.
    """
    return _insist(url, lambda client: client.describe(url))


def list_below(url: Url) -> list[RemoteFile]:
    """All files below a URL, by name; not the object that a console makes of the folder itself.

    Raises:
        RemoteError: If the store cannot be reached.
    """
    found = _insist(url, lambda client: client.list(url))
    return [file for file in found if file.url.key != url.key]


def read_range(
    url: Url,
    start: int,
    stop: int,
    *,
    version: str = "",
    retried: Callable[[], None] | None = None,
) -> bytes:
    """Bytes `start` to `stop` of a file.

    Args:
        url: The file.
        start: First byte.
        stop: Half-open end, not beyond the file's.
        version: Of which they must be; "": whichever is there.
        retried: Called whenever it is tried again.

    Raises:
        RemoteError: If it is not there, is another version, or cannot be reached.
    """

    def read(client: _Client) -> bytes:
        data = client.read(url, start, stop, version)
        if len(data) != stop - start:
            raise ConnectionError(f"{len(data)} bytes came instead of {stop - start}")
        return data

    return _insist(url, read, retried)


def read_parts(
    url: Url, num_bytes: int, *, retried: Callable[[], None] | None = None
) -> Iterator[bytes]:
    """The bytes of a file of this size, a part at a time."""
    for start in range(0, num_bytes, PART_BYTES):
        yield read_range(url, start, min(start + PART_BYTES, num_bytes), retried=retried)


def download(url: Url) -> bytes | None:
    """All bytes of a small file; None if it is not there.

    Raises:
        RemoteError: If it cannot be reached, or changes meanwhile.
    """
    try:
        found = describe(url)
    except RemoteError as error:
        if error.missing:
            return None
        raise
    return read_range(url, 0, found.num_bytes, version=found.version) if found.num_bytes else b""


def put(source: Path | bytes, url: Url) -> str:
    """Write a file, from a file or from bytes, whole or not at all; its version.

    Raises:
        RemoteError: If the store cannot be reached, or does not take it.
    """
    return _insist(url, lambda client: client.put(source, url))


def delete(url: Url) -> None:
    """Delete a file, which need not be there.

    Raises:
        RemoteError: If the store cannot be reached, or does not let it be.
    """
    _insist(url, lambda client: client.delete(url))


def side_by_side(work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Results of work on each item, in any order, some at a time.

    At the first error, or an interrupt, nothing new is begun, and nobody waits for what was: a
    request may take a minute, and is repeated or forgotten anyway.
    """
    results: queue.SimpleQueue[tuple[R | None, BaseException | None]] = queue.SimpleQueue()
    waiting, taking, stopped = iter(items), threading.Lock(), threading.Event()

    def run() -> None:
        while not stopped.is_set():
            with taking:
                item = next(waiting, None)
            if item is None:
                return
            try:
                results.put((work(item), None))
            except BaseException as error:
                results.put((None, error))

    for _ in range(min(_THREADS, len(items))):
        threading.Thread(target=run, name="slap-remote", daemon=True).start()
    try:
        for _ in items:
            value, error = results.get()
            if error is not None:
                raise error
            yield value  # type: ignore[misc]
    finally:
        stopped.set()


def _insist(url: Url, work: Callable[[_Client], T], retried: Callable[[], None] | None = None) -> T:
    deadline, failures = monotonic() + DEADLINE_SECONDS, 0
    while True:
        try:
            return _interruptible(lambda: work(_client(url)))
        except (FileNotFoundError, Changed) as error:
            missing = isinstance(error, FileNotFoundError)
            what = "which is not there" if missing else "which has changed meanwhile"
            cure = "check the address and the permissions" if missing else "run the same again"
            raise RemoteError(
                f"file must be there and stay as it is, got {str(url)!r}, {what}; {cure}.",
                missing=missing,
            ) from None
        except (*_BUGS, RemoteError):
            raise
        except Exception as error:
            failures += 1
            told = _told(error)
            if failures >= ATTEMPTS or monotonic() >= deadline:
                # Not chained: what a library says of a request may show what it was signed with.
                raise RemoteError(
                    f"file or folder must be within reach, got {str(url)!r}, of which attempt "
                    f"{failures} said: {told}; check network, credentials and permissions, and run "
                    "the same again."
                ) from None
        # A new client reads credentials anew.
        _clients.pop(_key(url), None)
        pause = min(BACKOFF_SECONDS * 2 ** (failures - 1), max(0.0, deadline - monotonic()))
        logger.warning("%s: attempt %d failed, again in %.1f s: %s", url, failures, pause, told)
        if retried is not None:
            retried()
        sleep(pause)


def _told(error: Exception) -> str:
    """What an error says, in one line, without what a URL in it may have been signed with."""
    text = str(error)
    line = (text.splitlines() or [""])[0].partition(": <")[0].rstrip(": ")
    # What S3 answers, and what kind of thing went wrong on the way there.
    codes = [code for found in _CODES.finditer(text) for code in found.groups() if code]
    code = f" ({', '.join(dict.fromkeys(codes))})" if codes else ""
    return f"{type(error).__name__}: {_SECRETS.sub(' ... ', line)[:300].strip()}{code}"


def _interruptible(work: Callable[[], T]) -> T:
    """Have Ctrl-C end the waiting for a request; obstore looks at it only when one has ended."""
    if threading.current_thread() is not threading.main_thread():
        return work()
    ended: list[tuple[T | None, BaseException | None]] = []
    done = threading.Event()

    def run() -> None:
        try:
            ended.append((work(), None))
        except BaseException as error:
            ended.append((None, error))
        done.set()

    threading.Thread(target=run, name="slap-remote", daemon=True).start()
    done.wait()
    value, error = ended[0]
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


_clients: dict[tuple[str, str, int], _Client] = {}


def _key(url: Url) -> tuple[str, str, int]:
    # Connections and threads of a process are no use to those that are forked from it.
    return url.scheme, url.host, os.getpid()


def _client(url: Url) -> _Client:
    key = _key(url)
    if key not in _clients:
        try:
            _clients[key] = _Repository() if url.scheme == "hf" else _ObjectStore(url)
        except ImportError as error:
            raise RemoteError(
                f"{url.scheme}:// must have its client installed, got {error}; "
                "pip install 'slap-stream[remote]'."
            ) from error
        except ConnectionError:
            raise
        except Exception as error:
            # A profile that is not there, a key file that is none: trying again mends neither.
            raise RemoteError(
                f"{url.scheme}:// must have usable settings, got {_told(error)}; see its client's "
                "environment variables and files."
            ) from None
    return _clients[key]


class _ObjectStore:
    """By obstore: S3, Google's and Azure's stores, and plain files on the web."""

    def __init__(self, url: Url) -> None:
        import obstore

        self._library = obstore
        self._store = _open_store(url)

    def describe(self, url: Url) -> RemoteFile:
        return self._found(url, self._library.head(self._store, url.key))

    def list(self, url: Url) -> list[RemoteFile]:
        if url.scheme in ("https", "http"):
            raise RemoteError(
                f"files on the web must be named one by one, got {str(url)!r}; a folder or a "
                "pattern cannot be looked into."
            )
        chunks = self._library.list(self._store, prefix=url.key or None)
        found = [self._found(url, entry) for chunk in chunks for entry in chunk]
        return sorted(found, key=lambda file: file.url.key)

    def read(self, url: Url, start: int, stop: int, version: str) -> bytes:
        from obstore.exceptions import PreconditionError

        options: Any = {"range": (start, stop)}
        if version.startswith('"'):
            options["if_match"] = version
        try:
            result = self._library.get(self._store, url.key, options=options)
        except PreconditionError as error:
            raise Changed from error
        data: bytes = result.bytes().to_bytes()
        return data

    def put(self, source: Path | bytes, url: Url) -> str:
        result = self._library.put(self._store, url.key, source, chunk_size=PART_BYTES)
        return str(result["e_tag"] or "")

    def delete(self, url: Url) -> None:
        self._library.delete(self._store, url.key)

    @staticmethod
    def _found(url: Url, meta: Any) -> RemoteFile:
        version = meta["e_tag"] or str(meta["last_modified"])
        return RemoteFile(Url(url.scheme, url.host, meta["path"]), int(meta["size"]), version)


class _Repository:
    """By fsspec: repositories of the Hugging Face hub; read only."""

    def __init__(self) -> None:
        import fsspec

        self._files = fsspec.filesystem("hf")

    def describe(self, url: Url) -> RemoteFile:
        return self._found(self._files.info(f"{url.host}/{url.key}"))

    def list(self, url: Url) -> list[RemoteFile]:
        found = self._files.find(f"{url.host}/{url.key}", detail=True)
        return [self._found(found[name]) for name in sorted(found)]

    def read(self, url: Url, start: int, stop: int, version: str) -> bytes:
        data: bytes = self._files.cat_file(f"{url.host}/{url.key}", start=start, end=stop)
        return data

    def put(self, source: Path | bytes, url: Url) -> str:
        raise NotImplementedError("repositories are only read")

    def delete(self, url: Url) -> None:
        raise NotImplementedError("repositories are only read")

    @staticmethod
    def _found(entry: Any) -> RemoteFile:
        if entry["type"] != "file":
            raise FileNotFoundError(entry["name"])
        host, _, key = str(entry["name"]).partition("/")
        lfs = entry.get("lfs") or {}
        version = str(lfs.get("sha256") or entry.get("blob_id") or "")
        return RemoteFile(Url("hf", host, key), int(entry["size"]), version)


def _open_store(url: Url) -> Any:
    """A store of obstore's, with credentials as its own clients find them."""
    from obstore.store import AzureStore, GCSStore, HTTPStore

    # All that is tried again is tried again by `_insist`, which says so.
    retry: Any = {"max_retries": 0}
    client: Any = {
        "timeout": f"{REQUEST_SECONDS * 1000:.0f}ms",
        "connect_timeout": f"{_CONNECT_SECONDS:.0f}s",
    }
    if url.scheme == "gs":
        return GCSStore(url.host, client_options=client, retry_config=retry)
    if url.scheme == "az":
        return AzureStore(url.host, client_options=client, retry_config=retry)
    if url.scheme == "s3":
        return _open_s3(url.host, client, retry)
    client["allow_http"] = url.scheme == "http"
    return HTTPStore.from_url(
        f"{url.scheme}://{url.host}", client_options=client, retry_config=retry
    )


def _open_s3(bucket: str, client: Any, retry: Any) -> Any:
    """Credentials, region and endpoint as boto3 finds them, which streaming's downloads use."""
    from boto3.session import Session
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Store

    session = Session()
    # The first is streaming's own.
    names = ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    endpoint = next((os.environ[name] for name in names if os.environ.get(name)), None)
    config: Any = {"region": session.region_name or _region_of(session, bucket, endpoint)}
    if endpoint is not None:
        config["endpoint"] = endpoint
        client["allow_http"] = endpoint.startswith("http://")
    if session.get_credentials() is None:
        # A public bucket, perhaps; streaming tries that, too.
        config["skip_signature"] = True
    else:
        config["credential_provider"] = Boto3CredentialProvider(session)
    return S3Store(bucket, client_options=client, retry_config=retry, **config)


def _region_of(session: Any, bucket: str, endpoint: str | None) -> str:
    """Where a bucket lies, when nobody has said; AWS answers that to anybody."""
    if endpoint is not None:
        return "us-east-1"
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = session.client("s3", config=Config(signature_version=UNSIGNED))
    try:
        answer = client.head_bucket(Bucket=bucket)
    except ClientError as error:
        answer = error.response
    except BotoCoreError as error:
        raise ConnectionError(f"the bucket's region is not known: {error}") from error
    headers = answer["ResponseMetadata"]["HTTPHeaders"]
    return str(headers.get("x-amz-bucket-region", "us-east-1"))
