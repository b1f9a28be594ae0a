"""What is a URL, and how it is shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_stream.errors import CorpusError
from slap_stream.remote.listing import _pattern
from slap_stream.remote.urls import READABLE, Url, is_remote, parse_url

NAMES = st.text("ab.*?[]% -", min_size=1, max_size=5).filter(lambda name: name.strip(". "))


@settings(max_examples=40)
@given(st.sampled_from(["s3", "gs", "az", "hf"]), NAMES, st.lists(NAMES, max_size=3))
def test_a_url_is_shown_as_it_was_given(scheme: str, host: str, parts: list[str]) -> None:
    text = "/".join([f"{scheme}://{host}", *parts])
    assert is_remote(text)
    url = parse_url("out", text)
    assert str(url) == text
    assert (url.host, url.key) == (host, "/".join(parts))
    assert str(url.below("c/d")) == f"{text}/c/d"
    assert url.below("c/d").name == "d"


@settings(max_examples=40)
@given(st.lists(st.text("ab%2025#?ü ~", min_size=1, max_size=9), min_size=1))
def test_a_url_of_the_web_is_quoted_once(parts: list[str]) -> None:
    url = Url("https", "host", "/".join(parts))
    assert parse_url("inputs", str(url)) == url
    assert str(parse_url("inputs", "http://h/a%2520b")) == "http://h/a%2520b"
    assert parse_url("inputs", "http://h/a%2520b").name == "a%20b"


@pytest.mark.parametrize("scheme", [*READABLE, "S3"])
def test_a_path_that_has_lost_a_slash_is_the_same_url(scheme: str) -> None:
    path = Path(f"{scheme}://bucket/a")
    assert is_remote(path)
    assert str(parse_url("out", path)) == f"{scheme.lower()}://bucket/a"


@pytest.mark.parametrize(
    "path", ["a", "./s3:/a", "/s3://a", "C:/data", "ftp://a/b", "s3:", 3, None]
)
def test_anything_else_is_none(path: object) -> None:
    assert not is_remote(path)


@pytest.mark.parametrize(
    "text",
    [
        "https://user:hidden@host/file",
        "s3://user:hidden@bucket/file",
        "https://host/file?X-Amz-Signature=hidden",
    ],
)
def test_a_url_that_holds_a_credential_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(CorpusError, match="without user, password and query") as refused:
        parse_url("inputs", text)
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize("text", ["s3://", "s3:///a", "https://"])
def test_a_url_without_a_bucket_is_refused(text: str) -> None:
    with pytest.raises(CorpusError, match="out must name a bucket or a host"):
        parse_url("out", text)


@pytest.mark.parametrize(
    ("pattern", "fits", "fits_not"),
    [
        ("a/*.jsonl", ["a/b.jsonl", "a/.jsonl"], ["a/b/c.jsonl", "a/bxjsonl", "xa/b.jsonl"]),
        ("a/**/*.gz", ["a/b.gz", "a/b/c.gz", "a/b/c/d.gz"], ["b/c.gz", "a/b.gzip"]),
        ("a?[bc][!d]", ["axbe", "a.c["], ["axde", "axbd", "a/be", "axb/"]),
        ("a[", ["a["], ["a", "ab"]),
        ("a.(b)+", ["a.(b)+"], ["ax(b)+", "a.bb"]),
    ],
)
def test_wild_cards_stay_within_a_part(pattern: str, fits: list[str], fits_not: list[str]) -> None:
    matches = _pattern(pattern)
    assert [name for name in (*fits, *fits_not) if matches(name)] == fits
