"""Requests against a real S3 server, and what befalls them."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import fsspec
import fsspec.implementations.memory
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from slap_stream.errors import RemoteError
from slap_stream.remote import bucket
from slap_stream.remote.bucket import delete, describe, download, list_below, put, read_range
from slap_stream.remote.listing import listed
from slap_stream.remote.reading import open_remote
from slap_stream.remote.urls import Url, parse_url
from tests.helpers.object_store import BUCKET, Fault, ObjectStore, fails_first

URL = Url("s3", BUCKET, "a/file")
DATA = bytes(range(256)) * 20


@pytest.mark.parametrize("fault", ["500", "reset", "short", "silent", "slow", "expired", "denied"])
def test_what_passes_is_waited_for_and_told(
    fault: Fault,
    store: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(bucket, "REQUEST_SECONDS", 0.5 if fault in ("silent", "slow") else 10.0)
    store.put(URL.key, DATA)
    store.fault = fails_first(fault, 2)
    retries: list[None] = []
    assert read_range(URL, 10, 3000, retried=lambda: retries.append(None)) == DATA[10:3000]
    assert len(retries) == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "s3://bucket/a/file: attempt 2 failed, again in" in caplog.text


@pytest.mark.parametrize(
    ("fault", "ask"),
    [
        ("denied", lambda: describe(URL)),
        ("reset", lambda: list_below(URL)),
        ("expired", lambda: list_below(URL)),
        ("500", lambda: read_range(URL, 0, 9)),
        ("denied", lambda: put(b"new", URL)),
        ("500", lambda: delete(URL)),
    ],
)
def test_what_does_not_pass_is_one_error_that_shows_no_secret(
    fault: Fault, ask: Callable[[], object], store: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(URL.key, DATA)
    store.fault = lambda method, path: fault
    caplog.set_level(logging.DEBUG)
    with pytest.raises(
        RemoteError, match=r"must be within reach, got 's3://bucket/a/file', of which attempt 6"
    ) as error:
        ask()
    assert len(store.requests) == bucket.ATTEMPTS
    assert not error.value.missing
    assert error.value.__cause__ is None
    for said in (str(error.value), caplog.text):
        assert "the-key" not in said
        assert "the-secret" not in said
        assert "Signature" not in said
    if fault == "expired":
        assert "(ExpiredToken" in str(error.value)
    store.fault = lambda method, path: None
    assert store.get(URL.key) == DATA


def test_a_deadline_ends_it_before_the_attempts_do(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "DEADLINE_SECONDS", 0.0)
    store.fault = lambda method, path: "500"
    with pytest.raises(RemoteError, match=r"attempt 1 said: .* 503 Service Unavailable"):
        list_below(URL)


def test_what_is_not_there_is_said_at_once(store: ObjectStore) -> None:
    with pytest.raises(RemoteError, match="'s3://bucket/a/file', which is not there") as error:
        describe(URL)
    assert error.value.missing
    assert download(URL) is None
    assert len(store.requests) == 2
    delete(URL)


def test_a_file_that_changes_while_it_is_read_is_refused(store: ObjectStore) -> None:
    store.put(URL.key, DATA)
    with open_remote(describe(URL)) as file:
        assert file.read(10) == DATA[:10]
        store.put(URL.key, DATA[::-1] * 2000)
        file.seek(0)
        file.read(10)
    store.put(URL.key, DATA * 2000)
    with open_remote(describe(URL)) as file:
        file.read(10)
        store.put(URL.key, DATA[::-1] * 2000)
        with pytest.raises(RemoteError, match="which has changed meanwhile; run the same again"):
            file.read()


def test_a_remote_file_is_read_like_a_local_one(store: ObjectStore) -> None:
    store.put(URL.key, b"one\ntwo\nthree")
    with open_remote(describe(URL)) as file:
        assert file.readline() == b"one\n"
        assert file.tell() == 4
        assert file.seek(-5, os.SEEK_END) == 8
        assert file.read() == b"three"
        assert file.read() == b""
        assert file.seek(99) == 99
        assert file.read(1) == b""
        file.seek(4)
        assert list(file) == [b"two\n", b"three"]


def test_files_are_listed_by_name_by_pattern_and_by_folder(
    store: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    for key in ("d/b.gz", "d/a.gz", "d/e/c.gz", "dd/x.gz"):
        store.put(key, b"x")

    def names(url: str) -> tuple[list[str], bool]:
        files, named = listed(parse_url("inputs", url))
        return [str(file).removeprefix("s3://bucket/") for file in files], named

    assert names("s3://bucket/d/a.gz") == (["d/a.gz"], True)
    assert names("s3://bucket/d/") == (["d/a.gz", "d/b.gz"], False)
    assert "1 files in its sub-folders are not read" in caplog.text
    assert names("s3://bucket/d/[b-z].gz") == (["d/b.gz"], False)
    assert names("s3://bucket/**/*.gz") == (["d/a.gz", "d/b.gz", "d/e/c.gz", "dd/x.gz"], False)
    with pytest.raises(RemoteError, match="below which nothing was found"):
        names("s3://bucket/d/*.zst")
    with pytest.raises(RemoteError, match="below which nothing was found"):
        names("s3://bucket/nothing")


def test_a_file_of_the_web_is_read(store: ObjectStore, caplog: pytest.LogCaptureFixture) -> None:
    store.client.put_object(Bucket=BUCKET, Key="a b.txt", Body=DATA, ACL="public-read")
    url = parse_url("inputs", f"{store.endpoint}/{BUCKET}/a%20b.txt")
    store.fault = fails_first("reset", 1)
    with open_remote(describe(url)) as file:
        file.seek(100)
        assert file.read(300) == DATA[100:400]
    with pytest.raises(RemoteError, match="must be named one by one"):
        list_below(url)


class Hub(fsspec.implementations.memory.MemoryFileSystem):
    """Says of its files what the hub's file system says."""

    cachable = False
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = super().info(path, **options)
        return found | {"name": found["name"].lstrip("/"), "blob_id": "b", "lfs": {"sha256": "h"}}

    def find(self, path: str, **options: Any) -> dict[str, Any]:
        return {name.lstrip("/"): self.info(name) for name in super().find(path)}


def test_a_repository_of_the_hub_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(fsspec, "filesystem", lambda protocol: Hub())
    bucket._clients.clear()
    Hub().pipe({"/datasets/me/data/a.jsonl": DATA, "/datasets/me/data/more/b.jsonl": b"b"})
    files, named = listed(parse_url("inputs", "hf://datasets/me/data/**/*.jsonl"))
    assert [str(file) for file in files] == [
        "hf://datasets/me/data/a.jsonl",
        "hf://datasets/me/data/more/b.jsonl",
    ]
    assert not named
    assert files[0].stat() == (len(DATA), "h")
    with open_remote(files[0].file) as file:
        file.seek(7)
        assert file.read(20) == DATA[7:27]
    with pytest.raises(RemoteError, match="which is not there"):
        describe(Url("hf", "datasets", "me/data/none"))
    with pytest.raises(NotImplementedError):
        put(b"", Url("hf", "datasets", "me/data/new"))
    bucket._clients.clear()


def test_an_interrupt_ends_the_waiting_for_a_request(store: ObjectStore) -> None:
    store.fault = lambda method, path: "silent"
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        describe(URL)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("status", [200, 301, 403])
def test_the_region_is_asked_for_where_nobody_has_said_it(status: int) -> None:
    answer = {
        "ResponseMetadata": {"HTTPHeaders": {"x-amz-bucket-region": "eu-west-3"}},
        "Error": {"Code": str(status)},
    }

    class Client:
        def head_bucket(self, Bucket: str) -> dict[str, Any]:
            if status != 200:
                raise ClientError(answer, "HeadBucket")
            return answer

    session = SimpleNamespace(client=lambda name, config: Client())
    assert bucket._region_of(session, BUCKET, None) == "eu-west-3"
    assert bucket._region_of(session, BUCKET, "http://127.0.0.1") == "us-east-1"


def test_a_region_that_nobody_answers_for_is_asked_for_again(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(**options: str) -> None:
        asked.append(options)
        raise EndpointConnectionError(endpoint_url="somewhere")

    asked: list[dict[str, str]] = []
    client = SimpleNamespace(head_bucket=unreachable)
    monkeypatch.setattr("boto3.session.Session.client", lambda *args, **options: client)
    for name in ("AWS_DEFAULT_REGION", "S3_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    with pytest.raises(RemoteError, match=r"attempt 6 said: .*region is not known: Could not conn"):
        describe(URL)
    assert len(asked) == bucket.ATTEMPTS


def test_a_client_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    bucket._clients.clear()
    with pytest.raises(RemoteError, match=r"pip install 'slap-stream\[remote\]'"):
        describe(Url("gs", "bucket", "a"))


def test_a_profile_that_is_not_there_is_named(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(RemoteError, match=r"s3:// must have usable settings, got .*nobody"):
        describe(URL)
