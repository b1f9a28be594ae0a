"""Samples that cannot be read or collated: left out, counted, and no law broken."""

from __future__ import annotations

import errno
import logging
from collections import Counter
from http.client import IncompleteRead
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from streaming import MDSWriter, StreamingDataset
from torch.utils.data import default_collate

from slap_stream.errors import ConfigError, SampleError, ShardError
from slap_stream.loader.bad_samples import LenientCollate, LenientView, PartOfBatch, is_of_sample
from slap_stream.shards.writer import open_writer
from slap_stream.text.collate import ChatCollator
from tests.laws import as_json, config_of
from tests.loader.test_loader import BATCH, LOSSES, NUM_SAMPLES, make, vectors
from tests.test_training import byte_tokenizer


class Failing(StreamingDataset):
    """Cannot read some samples."""

    unreadable: frozenset[int] = frozenset()

    def __getitem__(self, at: Any) -> Any:
        sample = super().__getitem__(at)
        if sample["number"] in self.unreadable:
            raise ValueError(f"no {sample['number']}")
        return sample


def test_a_sample_of_another_length_than_its_values_in_a_shard_without_hashes_is_left_out(
    tmp_path: Path,
) -> None:
    with MDSWriter(columns={"text": "str"}, out=str(tmp_path)) as writer:
        for n in range(5):
            writer.write({"text": f"text {n}"})
    (path,) = tmp_path.glob("*.mds")
    data = np.fromfile(path, np.uint8)
    data[data[4:24].view(np.uint32)[2]] += 1
    data.tofile(path)
    view = LenientView(StreamingDataset(local=str(tmp_path), batch_size=1))
    samples = view.__getitems__(range(5))
    assert [sample["text"] for n, sample in enumerate(samples) if n != 2] == [
        f"text {n}" for n in (0, 1, 3, 4)
    ]
    assert samples[2].reason.startswith("ValueError: a sample must be as long as its values say")


class Collate:
    """Cannot collate some samples, and takes samples apart."""

    def __init__(self, numbers: frozenset[int]) -> None:
        self.numbers = numbers

    def __call__(self, samples: list[Any]) -> Any:
        for sample in samples:
            if len(sample.pop("text")) and sample["number"] in self.numbers:
                raise KeyError(sample["number"])
        return default_collate(samples)


def loader_of(
    corpus: Path, unreadable: Any = (), uncollated: Any = (), *, lanes: int = 2, **options: Any
) -> Any:
    dataset = Failing(local=str(corpus), batch_size=options.get("batch_size", BATCH))
    dataset.unreadable = frozenset(unreadable)
    config = {"num_lanes": lanes, "lookahead": 4, "max_withdrawn": 1.0} | options.pop("config", {})
    return make(
        corpus,
        dataset=dataset,
        config=config_of(**config),
        collate_fn=Collate(frozenset(uncollated)),
        **options,
    )


def run(loader: Any, batches: int = 10**6) -> list[list[int]]:
    """The rest of the epoch, or its next batches."""
    found = []
    for batch in islice(loader, batches):
        assert batch["number"].tolist() == batch["sample_id"].tolist()
        loader.observe(batch["sample_id"], torch.tensor(LOSSES)[batch["sample_id"]])
        found.append(batch["sample_id"].tolist())
    return found


@pytest.mark.parametrize(
    ("bad", "size", "lanes", "lookahead", "grouping"),
    [
        (0.1, 16, 2, 4, 1),
        (0.5, 8, 4, 3, 3),
        (0.3, 2, 2, 2, 1),
        (0.5, 1, 1, 4, 3),
        (0.1, 4, 4, 0, 1),
    ],
)
def test_the_laws_hold_whatever_fails(
    corpus: Path, bad: float, size: int, lanes: int, lookahead: int, grouping: int
) -> None:
    rng = np.random.default_rng(0)
    failing = np.flatnonzero(rng.random(NUM_SAMPLES) < bad)
    where = rng.random(len(failing)) < 0.5
    options: dict[str, Any] = {
        "lanes": lanes,
        "batch_size": size,
        # Twenty steps at most: each costs a change of threads.
        "config": {
            "lookahead": lookahead,
            "length_grouping": grouping,
            "keep": min(0.7, size / 20),
        },
    }

    def make_one() -> Any:
        return loader_of(corpus, failing[where], failing[~where], **options)

    loader = make_one()
    found = run(loader, 5)
    state = as_json(loader.state_dict())
    rest = run(loader)
    steps = len(loader)
    assert len(found) + len(rest) == steps == int(options["config"]["keep"] * NUM_SAMPLES) // size
    # Everything once, but for what stands in for a lane's part of which nothing is left.
    times = Counter(i for batch in found + rest for i in batch)
    assert not times.keys() & set(failing.tolist())
    again = sum(times.values()) - len(times)
    assert not again or bad >= 0.3 or size == lanes
    assert all(1 <= len(batch) <= size for batch in found + rest)
    metrics = loader.metrics()
    withdrawn = metrics["samples_withdrawn"]
    assert metrics["trained"] == len(times) == steps * size - withdrawn
    assert metrics["withdrawn"] == withdrawn
    assert metrics["withdrawn_fraction"] == withdrawn / NUM_SAMPLES
    assert metrics["offered"] == metrics["trained"] + metrics["pruned"] + withdrawn
    # A resumed run goes on alike, its counts too.
    resumed = make_one()
    resumed.load_state_dict(state)
    assert run(resumed) == rest
    assert resumed.metrics()["samples_withdrawn"] == withdrawn


def test_a_bad_sample_is_counted_as_often_as_it_comes(corpus: Path) -> None:
    config = {"keep": 0.5, "steps": "full"}
    loader = loader_of(corpus, range(0, NUM_SAMPLES, 20), config=config)
    found = run(loader, 9)
    state = as_json(loader.state_dict())
    found += run(loader)
    assert len(found) == len(loader) == NUM_SAMPLES // BATCH
    times = Counter(i for batch in found for i in batch)
    assert not times.keys() & set(range(0, NUM_SAMPLES, 20))
    assert max(times.values()) == 2
    metrics = loader.metrics()
    withdrawn = metrics["samples_withdrawn"]
    assert metrics["trained"] == times.total() == len(found) * BATCH - withdrawn
    assert metrics["offered"] == metrics["trained"] + metrics["pruned"] + withdrawn
    # Of those that were offered, not of a pass: else two passes would end a run at half the damage.
    assert metrics["offered"] == 2 * NUM_SAMPLES
    assert metrics["withdrawn_fraction"] == withdrawn / metrics["offered"]
    resumed = loader_of(corpus, range(0, NUM_SAMPLES, 20), config=config)
    resumed.load_state_dict(state)
    assert run(resumed) == found[9:]
    assert resumed.metrics()["samples_withdrawn"] == withdrawn


def test_batches_without_bad_samples_do_not_depend_on_workers(corpus: Path) -> None:
    failing = range(0, NUM_SAMPLES, 5)
    options: dict[str, Any] = {"batch_size": 4, "config": {"keep": 0.1}}
    alone = run(loader_of(corpus, failing, range(1, NUM_SAMPLES, 7), **options))
    many = loader_of(corpus, failing, range(1, NUM_SAMPLES, 7), num_workers=2, **options)
    assert run(many) == alone
    assert any(len(batch) < 4 for batch in alone)


def test_a_bad_sample_is_told_of_once_and_bounded(
    corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failing = frozenset(range(0, NUM_SAMPLES, 10))
    loader = loader_of(corpus, (), failing, config={"max_withdrawn": 3 / NUM_SAMPLES})
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(
            SampleError,
            match=r"at most max_withdrawn = 0.0075 of the epoch's, got 0\.0\d+: \d samples, and "
            r"those of damaged shards; sample \d+ was the last: KeyError: \d+\. Mend",
        ),
    ):
        run(loader)
    told = [r.getMessage() for r in caplog.records if "is withdrawn: KeyError" in r.getMessage()]
    assert 1 <= len(told) <= 3
    # Nothing is lost, and whoever goes on meets it again, or with a larger bound goes on.
    with pytest.raises(SampleError, match=r"got 0\.0"):
        run(loader)
    before = loader.metrics()["samples_withdrawn"]
    state = loader.state_dict()
    larger = loader_of(corpus, (), failing)
    larger.load_state_dict(state)
    rest = run(larger)
    assert not failing & {i for batch in rest for i in batch}
    assert larger.metrics()["samples_withdrawn"] >= before


def test_bad_samples_raise_if_asked_to(corpus: Path) -> None:
    strict = {"on_bad_sample": "raise"}
    with pytest.raises(ValueError, match=r"no \d+"):
        run(loader_of(corpus, range(0, NUM_SAMPLES, 3), config=strict))
    with pytest.raises(KeyError, match=r"\d+"):
        run(loader_of(corpus, (), range(0, NUM_SAMPLES, 3), config=strict))
    with pytest.raises(ConfigError, match="on_bad_sample must be one of raise, skip, got 'drop'"):
        config_of(on_bad_sample="drop")


def of_module(name: str, *kinds: type[Exception]) -> Exception:
    """An error of a library that need not be there."""
    return type("Failure", kinds, {"__module__": name})("timed out")  # type: ignore[no-any-return]


def after(error: Exception, *, cause: Exception | None = None, context: Any = None) -> Exception:
    """An error that comes of another."""
    error.__cause__, error.__context__ = cause, context
    return error


@pytest.mark.parametrize(
    ("error", "of_sample"),
    [
        (URLError("timed out"), False),
        (IncompleteRead(b""), False),
        (of_module("requests.exceptions", OSError), False),
        (of_module("mine", type(of_module("botocore.exceptions", Exception))), False),
        (of_module("requests_of_users", ValueError), True),
        (of_module("google.protobuf.message", Exception), True),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (after(ValueError("no image"), cause=URLError("timed out")), False),
        (after(ValueError("no image"), context=TimeoutError("slow")), False),
        (after(ValueError("no image"), cause=KeyError("image")), True),
        (ValueError("no text"), True),
        (UnicodeDecodeError("utf-8", b"", 0, 1, "torn"), True),
        (OSError("image file is truncated"), True),
        (OSError(errno.EIO, "disk"), False),
        (FileNotFoundError(errno.ENOENT, "gone"), False),
        (ConnectionError("reset"), False),
        (MemoryError(), False),
        (ShardError("not fetched"), False),
        (ConfigError("a setting"), False),
    ],
    ids=repr,
)
def test_what_the_system_says_is_no_samples_fault(
    corpus: Path, error: Exception, of_sample: bool
) -> None:
    assert is_of_sample(error) is of_sample

    def collate(samples: list[Any]) -> Any:
        if 3 in samples:
            raise error
        return samples

    lenient = LenientCollate(collate)
    assert lenient([1, 2]) == [1, 2]
    if of_sample:
        made = lenient([1, 3, 2])
        assert made == PartOfBatch([1, 2], [0, 2], {1: f"{type(error).__name__}: {error}"})
    else:
        with pytest.raises(type(error)):
            lenient([1, 3, 2])


def test_an_error_that_no_sample_makes_alone_is_raised() -> None:
    def collate(samples: list[int]) -> list[int]:
        if len(samples) > 1:
            raise ValueError("of unlike shapes")
        return samples

    with pytest.raises(ValueError, match="of unlike shapes"):
        LenientCollate(collate)([1, 2])
    assert LenientCollate(collate)([1]) == [1]


def test_what_cannot_be_probed_leaves_the_pool(corpus: Path) -> None:
    failing = frozenset(range(0, NUM_SAMPLES, 3))
    loader = loader_of(corpus, failing)
    host = loader.probe_host()
    run(loader, 4)
    ids = host.probe_candidates(20)
    bad = np.isin(ids, list(failing))
    assert bad.any()
    assert not bad.all()
    batch = host.read_batch(ids)
    read = batch["sample_id"].numpy()
    np.testing.assert_array_equal(read[~bad], ids[~bad])
    assert set(read[bad].tolist()) <= set(ids[~bad].tolist())
    before = loader.metrics()
    host.update(ids, LOSSES[ids], None, {})
    after = loader.metrics()
    gone = len(set(ids[bad].tolist()))
    assert after["samples_withdrawn"] - before["samples_withdrawn"] == gone
    assert before["pooled"] - after["pooled"] == gone
    assert after["observed"] - before["observed"] == np.count_nonzero(~bad)
    # None of a lane's can be read: others of before are.
    only = np.array(sorted(failing))[:4]
    assert not failing & set(host.read_batch(only)["sample_id"].tolist())
    # Nor need the first samples of a dataset be such as can be read.
    fresh = loader_of(corpus, range(30)).probe_host().read_batch(np.array([0, 1]))
    assert set(fresh["sample_id"].tolist()) == {30, 31}


def test_records_that_a_chat_template_or_max_length_has_no_place_for_end_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def chat(prompt: str, **more: Any) -> list[dict[str, Any]]:
        answer = {"role": "assistant", "content": "yes", **more}
        return [{"role": "user", "content": prompt}, answer]

    tools = [{"role": "user", "content": "?", "tools": [{"name": "clock"}]}, chat("")[1]]
    bad = {7: chat("long " * 99), 50: tools, 90: chat("?", reasoning_content="well")}
    with open_writer(tmp_path / "chats", {"messages": "json"}, shard_bytes=2000) as writer:
        for number in range(120):
            writer.write({"messages": bad.get(number, chat(f"is {number} a number?"))})
    for truncate, expected in (("right", {7, 50, 90}), ("left", {50, 90})):
        loader = make(
            tmp_path / "chats",
            dataset=StreamingDataset(local=str(tmp_path / "chats"), batch_size=BATCH),
            embeddings=vectors(120),
            config=config_of(num_lanes=1, keep=1.0, max_withdrawn=0.05),
            collate_fn=ChatCollator(byte_tokenizer(), max_length=64, truncate=truncate),
        )
        found = {i for batch in loader for i in batch["sample_id"].tolist()}
        # Seven batches of sixteen are not quite all.
        assert not found & expected
        assert loader.metrics()["trained"] + loader.metrics()["samples_withdrawn"] == 112
    assert "which the template does not write" in caplog.text or "none in a record" in caplog.text


def test_an_interrupt_counts_no_sample_twice(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = range(0, NUM_SAMPLES, 3)
    unbroken = loader_of(corpus, failing)
    expected = run(unbroken, 3)
    loader = loader_of(corpus, failing)
    found = run(loader, 1)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    # After the withdrawal, before the batch is delivered.
    with monkeypatch.context() as patched:
        patched.setattr("slap_stream.loader.delivery.with_ids", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(loader, 1)
    assert found + run(loader, 2) == expected
    for name in ("samples_withdrawn", "trained", "observed"):
        assert loader.metrics()[name] == unbroken.metrics()[name]
