"""SlapDataLoader over real shards: the same batches whatever the workers, resume, refusals."""

from __future__ import annotations

import gc
import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from streaming import Stream, StreamingDataset

from slap_stream import SlapDataLoader, SlapSampler
from slap_stream.embeddings.rows import ArrayStore
from slap_stream.errors import (
    AlignmentError,
    ConfigError,
    FeedbackError,
    ShardError,
    StateError,
)
from slap_stream.shards.writer import open_writer
from tests.laws import FIRM, as_json, config_of

NUM_SAMPLES, BATCH = 400, 16
# Batches that are compared after a resume: several refreshes.
AFTERWARDS = 12
LOSSES = np.random.default_rng(3).gamma(4.0, 0.5, 4 * NUM_SAMPLES)


def write_corpus(path: Path, first: int = 0, count: int = NUM_SAMPLES) -> Path:
    """Shards of about forty samples that hold their own number."""
    with open_writer(path, {"number": "int", "text": "str"}, shard_bytes=2000) as writer:
        for number in range(first, first + count):
            writer.write({"number": number, "text": "word " * (1 + number % 7)})
    return path


def vectors(count: int = NUM_SAMPLES) -> np.ndarray[Any, Any]:
    """Embeddings."""
    return np.random.default_rng(0).normal(size=(count, 8)).astype(np.float16)


def make(
    corpus: Path,
    *,
    embeddings: Any = None,
    dataset: Any = None,
    config: Any = None,
    batch_size: int | None = BATCH,
    **options: Any,
) -> SlapDataLoader:
    """A loader over a local corpus."""
    if dataset is None:
        dataset = StreamingDataset(local=str(corpus), batch_size=BATCH)
    return SlapDataLoader(
        dataset,
        batch_size,
        embeddings=vectors() if embeddings is None else embeddings,
        config=config or config_of(num_lanes=2, lookahead=4),
        **options,
    )


def feed(loader: SlapDataLoader, batch: Any) -> list[int]:
    """Observe a batch by the table of losses; its ids."""
    assert batch["number"].tolist() == batch["sample_id"].tolist()
    loader.observe(batch["sample_id"], torch.tensor(LOSSES)[batch["sample_id"]])
    ids: list[int] = batch["sample_id"].tolist()
    return ids


def run(loader: SlapDataLoader, batches: int) -> list[list[int]]:
    """The next batches, over as many epochs as it takes."""
    ids: list[list[int]] = []
    while len(ids) < batches:
        ids += [feed(loader, batch) for batch in islice(loader, batches - len(ids))]
    return ids


@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 1},
        {"num_workers": 2, "persistent_workers": True},
        {"num_workers": 2, "prefetch_factor": 1},
        {"num_workers": 1, "multiprocessing_context": "spawn", "persistent_workers": True},
    ],
    ids=["one", "persistent", "shallow", "spawn"],
)
def test_batches_do_not_depend_on_workers(
    corpus: Path, unbroken: list[list[int]], options: dict[str, Any]
) -> None:
    dataset = StreamingDataset(local=str(corpus), batch_size=BATCH)
    # Used before the workers start: locks and files must not travel with it.
    assert dataset[3]["number"] == next(iter(dataset))["number"] + 3 == 3
    assert run(make(corpus, dataset=dataset, **options), len(unbroken)) == unbroken


def test_forked_workers_read_a_dataset_that_was_iterated(
    corpus: Path, unbroken: list[list[int]]
) -> None:
    """Streaming's own iteration does not: its barrier's lock is the main process's."""
    dataset = StreamingDataset(local=str(corpus), batch_size=BATCH)
    assert len(list(dataset)) == NUM_SAMPLES
    loader = make(corpus, dataset=dataset, num_workers=1, multiprocessing_context="fork")
    assert run(loader, 6) == unbroken[:6]


def test_metrics_are_named_as_trackers_want_them_and_grouped_by_a_prefix(corpus: Path) -> None:
    loader = make(corpus)
    run(loader, 6)
    metrics = loader.metrics()
    # W&B takes other names, but cannot plot by them.
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in metrics)
    assert all(type(value) is float for value in metrics.values())
    assert loader.metrics(prefix="slap/") == {f"slap/{name}": metrics[name] for name in metrics}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_is_exact_at_any_batch(
    corpus: Path, unbroken: list[list[int]], num_workers: int
) -> None:
    steps = len(unbroken) // 3
    # Every step is tried without a loader, in test_sampler; here batches ahead come on top.
    later = range(steps + 4, 2 * steps, 5) if not num_workers else ()
    loader, done = make(corpus, num_workers=num_workers), 0
    for cut in (0, 1, 4, 5, steps - 1, steps, steps + 1, *later):
        assert run(loader, cut - done) == unbroken[done:cut]
        done, state = cut, as_json(loader.state_dict())
        again = make(corpus)
        again.load_state_dict(state)
        assert as_json(again.state_dict()) == state
        rest = unbroken[cut : cut + AFTERWARDS]
        assert run(again, len(rest)) == rest


def auto(corpus: Path, steps: str = "fewer") -> SlapDataLoader:
    """A loader that finds three in ten dispensable by itself."""
    wrong = np.random.default_rng(1).random((NUM_SAMPLES, 1)) < 0.3
    store = ArrayStore(vectors(), features=wrong.astype(np.float16), feature_names=["mismatch"])
    config = config_of(num_lanes=2, lookahead=4, keep="auto", steps=steps, **FIRM)
    return make(corpus, embeddings=store, config=config)


def progressing(loader: SlapDataLoader, batches: int) -> list[tuple[list[int], float, int]]:
    """The next batches, with the progress and the epoch after each."""
    found: list[tuple[list[int], float, int]] = []
    while len(found) < batches:
        for batch in islice(loader, batches - len(found)):
            found.append((feed(loader, batch), loader.progress, loader.epoch))
            # One clock, whoever is asked; also with an epoch's last batch.
            assert loader.metrics()["epoch"] == loader.epochs_done
            assert int(loader.epochs_done) == loader.epoch
    return found


def test_progress_goes_from_0_to_1_whatever_an_epoch_comes_to(corpus: Path) -> None:
    loader = auto(corpus)
    assert loader.progress == 0.0
    assert loader.epochs_done == 0.0
    epochs = [[(feed(loader, b), loader.progress) for b in loader] for _ in range(2)]
    assert (loader.epoch, loader.progress, loader.epochs_done) == (2, 1.0, 2.0)
    for epoch in epochs:
        assert len(epoch) < 0.9 * len(loader)
        shares = [progress for _, progress in epoch]
        assert np.all(np.diff([0.0, *shares]) > 0)
        assert shares[-1] == 1.0
    # With a fixed keep, or as many steps as full data has, it is the share of the batches.
    for known in (make(corpus), auto(corpus, "full")):
        shares = [loader.progress for loader in [known] for _ in known]
        np.testing.assert_allclose(shares, np.arange(1, len(known) + 1) / len(known))


@pytest.mark.parametrize("steps", ["fewer", "full"])
def test_with_auto_resume_is_exact_at_every_batch(corpus: Path, steps: str) -> None:
    loader = auto(corpus, steps)
    unbroken = progressing(loader, 1)
    states = {1: as_json(loader.state_dict())}
    while len(unbroken) < 43:
        unbroken += progressing(loader, 6)
        states[len(unbroken)] = as_json(loader.state_dict())
    assert {epoch for _, _, epoch in unbroken} == ({0, 1} if steps == "full" else {0, 1, 2})
    for cut, state in states.items():
        again = auto(corpus, steps)
        again.load_state_dict(state)
        assert again.progress == unbroken[cut - 1][1]
        rest = unbroken[cut : cut + AFTERWARDS]
        assert progressing(again, len(rest)) == rest


@pytest.mark.parametrize("missing", ["sampler", "probe", "pending"])
def test_a_state_that_was_cut_changes_nothing(corpus: Path, missing: str) -> None:
    loader = make(corpus)
    run(loader, 3)
    before = as_json(loader.state_dict())
    cut = {name: part for name, part in before.items() if name != missing}
    with pytest.raises(
        StateError, match=f"state.{missing} must be there, got none; the state was cut"
    ):
        loader.load_state_dict(cut)
    with pytest.raises(StateError, match="must be what state_dict gave, got NoneType"):
        loader.load_state_dict(None)
    assert as_json(loader.state_dict()) == before


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_distributed_checkpoints_hold_runs_of_any_number_of_lanes(
    corpus: Path, tmp_path: Path, unbroken: list[list[int]]
) -> None:
    loader = make(corpus)
    ids = run(loader, 6)
    dcp.save({"loader": loader}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    # Of one lane before it loads, as nobody says otherwise.
    again = make(corpus, config=config_of(lookahead=4))
    dcp.load({"loader": again}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    found, saved = (as_json(which.state_dict())["sampler"] for which in (again, loader))
    assert found["lanes"] == saved["lanes"], "counters too, of which a new loader has none"
    assert ids + run(again, 5) == unbroken[:11]


def test_breaking_off_goes_on_with_the_epoch(corpus: Path, unbroken: list[list[int]]) -> None:
    loader = make(corpus, num_workers=2, persistent_workers=True)
    ids: list[list[int]] = []
    while len(ids) < len(unbroken):
        ids += run(loader, min(5, len(unbroken) - len(ids)))
    assert ids == unbroken


def test_iterating_leaves_torchs_random_state_alone(corpus: Path) -> None:
    before = torch.get_rng_state()
    run(make(corpus), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_offers_all_and_trains_keep_of_it(corpus: Path) -> None:
    loader = make(corpus)
    ids = [i for batch in run(loader, len(loader)) for i in batch]
    assert len(ids) == len(set(ids)) == int(0.7 * NUM_SAMPLES // BATCH) * BATCH
    metrics = loader.metrics()
    assert metrics["offered"] == NUM_SAMPLES
    assert metrics["trained"] == len(ids)
    assert loader.epoch == 1


def test_streams_with_weights_and_one_store_each(tmp_path: Path) -> None:
    first = write_corpus(tmp_path / "a", 0, 120)
    second = write_corpus(tmp_path / "b", 120, 200)
    dataset = StreamingDataset(
        streams=[Stream(local=str(first), repeat=2), Stream(local=str(second), repeat=0.5)],
        batch_size=BATCH,
    )
    table = vectors(320)
    loader = make(tmp_path, dataset=dataset, embeddings=[table[:120], table[120:]])
    ids = np.concatenate(run(loader, len(loader)))
    assert loader.metrics()["offered"] == 240 + 100
    assert np.bincount(ids[ids < 120]).max() == 2
    assert np.bincount(ids[ids >= 120]).max() == 1


class Doubling(StreamingDataset):
    """A dataset whose samples are made in `__getitem__`, as tokenising ones are."""

    def __getitem__(self, at: Any) -> Any:
        sample = super().__getitem__(at)
        return {**sample, "double": 2 * sample["number"]}


def test_a_subclass_that_makes_samples_still_does(corpus: Path) -> None:
    dataset = Doubling(local=str(corpus), batch_size=BATCH)
    batch = next(iter(make(corpus, dataset=dataset)))
    assert (batch["double"] == 2 * batch["sample_id"]).all()


def break_shard(corpus: Path, name: str) -> None:
    """Cut a shard file short."""
    with (corpus / name).open("r+b") as file:
        file.truncate(100)


def test_a_bad_shard_raises_or_is_withdrawn(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    break_shard(corpus, "shard.00002.mds")
    with pytest.raises(ShardError, match=r"shard.00002.mds"):
        run(make(corpus), 10)
    config = config_of(num_lanes=2, lookahead=4, on_bad_shard="skip", max_withdrawn=1.0)
    loader = make(corpus, config=config)
    ids = {i for batch in run(loader, len(loader)) for i in batch}
    bad = json.loads((corpus / "index.json").read_text())["shards"][2]["samples"]
    metrics = loader.metrics()
    assert metrics["withdrawn"] == bad
    assert metrics["withdrawn_fraction"] == bad / NUM_SAMPLES
    assert metrics["shards_withdrawn"] == 1
    assert metrics["offered"] == NUM_SAMPLES - bad
    assert metrics["epochs_cut_short"] == 0
    assert len(ids) == int(0.7 * NUM_SAMPLES // BATCH) * BATCH


def test_a_loader_that_a_bad_shard_ended_ends_its_threads(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    break_shard(corpus, "shard.00002.mds")
    loader = make(corpus)
    threads = loader._fetcher._threads
    with pytest.raises(ShardError):
        list(loader)
    del loader
    gc.collect()
    for thread in threads:
        thread.join(10.0)
        assert not thread.is_alive()


def test_a_run_that_loses_too_many_candidates_stops_and_may_go_on(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    break_shard(corpus, "shard.00002.mds")
    settings: dict[str, Any] = {"num_lanes": 2, "lookahead": 4, "on_bad_shard": "skip"}
    unbroken = make(corpus, config=config_of(**settings, max_withdrawn=1.0))
    loader = make(corpus, config=config_of(**settings))
    ids: list[list[int]] = []
    with pytest.raises(ShardError, match=r"must be at most max_withdrawn = 0\.01 of the dataset"):
        ids.extend(feed(loader, batch) for batch in loader)
    with pytest.raises(ShardError, match="max_withdrawn"):
        next(iter(loader))
    again = make(corpus, config=config_of(**settings, max_withdrawn=1.0))
    again.load_state_dict(loader.state_dict())
    ids += [feed(again, batch) for batch in again]
    assert ids == [feed(unbroken, batch) for batch in unbroken]


def test_a_run_that_a_bad_shard_ended_goes_on_without_it(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    options = {"num_lanes": 1, "lookahead": 1, "pool_batches": 2, "shards_per_block": 1}
    loader = make(corpus, config=config_of(**options))
    order = loader.sampler.lanes[0].intake.order
    (broken,) = order.shards_of_block(order.num_blocks // 2)
    break_shard(corpus, f"shard.{broken:05}.mds")
    ids: list[list[int]] = []

    def train(loader: SlapDataLoader) -> None:
        for batch in loader:
            ids.append(feed(loader, batch))

    with pytest.raises(ShardError, match=rf"shard.{broken:05}.mds"):
        train(loader)
    before = len(ids)
    skipping = config_of(**options, on_bad_shard="skip", max_withdrawn=1.0)
    again = make(corpus, config=skipping)
    again.load_state_dict(as_json(loader.state_dict()))
    train(again)
    assert 0 < before < len(ids) <= len(again)
    metrics = again.metrics()
    first, size = again.sampler.table.first_id[broken], again.sampler.table.sizes[broken]
    assert metrics["withdrawn"] == size
    assert metrics["offered"] == NUM_SAMPLES - size
    trained = np.concatenate(ids)
    assert len(np.unique(trained)) == len(trained)
    assert not np.isin(np.arange(first, first + size), trained).any()


@pytest.mark.parametrize(("before", "after"), [(4, 0), (0, 6), (40, 2)])
def test_a_run_goes_on_with_another_lookahead(corpus: Path, before: int, after: int) -> None:
    config = config_of(num_lanes=2, lookahead=before, probe_every=1)
    loader = make(corpus, config=config)
    first = run(loader, 3)
    state = as_json(loader.state_dict())
    composed = first + state["pending"]
    again = make(corpus, config=config_of(num_lanes=2, lookahead=after, probe_every=1))
    again.load_state_dict(state)
    # What was composed comes as it was, is fed back like the rest, and the epoch ends as it should.
    rest = run(again, len(again) - 3)
    assert (first + rest)[: len(composed)] == composed
    trained = [i for batch in first + rest for i in batch]
    assert len(set(trained)) == len(trained) == int(0.7 * NUM_SAMPLES // BATCH) * BATCH
    assert again.metrics()["observed"] == len(trained)
    # From here on feedback is late by the new number.
    run(again, 3)
    assert len(again.state_dict()["pending"]) == after


def test_an_epoch_ends_early_when_withdrawals_leave_too_little(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    break_shard(corpus, "shard.00002.mds")
    config = config_of(num_lanes=2, lookahead=4, on_bad_shard="skip", max_withdrawn=1.0, keep=1.0)
    loader = make(corpus, config=config)
    delivered = [feed(loader, batch) for batch in loader]
    assert 0 < len(delivered) < len(loader)
    assert loader.metrics()["epochs_cut_short"] == 1
    assert loader.epoch == 1
    assert [feed(loader, batch) for batch in loader], "the next epoch goes on"


def test_the_batch_size_is_the_datasets_unless_only_the_loader_has_one(
    corpus: Path, unbroken: list[list[int]]
) -> None:
    assert run(make(corpus, batch_size=None), 3) == unbroken[:3]
    dataset = StreamingDataset(local=str(corpus), batch_size=None)
    assert run(make(corpus, dataset=dataset), 3) == unbroken[:3]
    with pytest.raises(ConfigError, match=r"batch_size must be given .* got neither; write Slap"):
        make(corpus, dataset=dataset, batch_size=None)


def test_the_sampler_is_the_one_that_composes_and_the_probes_business_is_elsewhere(
    corpus: Path,
) -> None:
    loader = make(corpus)
    for batch in islice(loader, 3):
        feed(loader, batch)
    assert isinstance(loader.sampler, SlapSampler)
    # Three that were delivered, and the lookahead: it has waited for what is composed ahead.
    assert loader.sampler.step == 3 + 4
    with pytest.raises(ValueError, match="sampler attribute should not be set"):
        loader.sampler = None
    host = loader.probe_host()
    members = ("num_local_lanes", "probe_budget", "probe_candidates", "read_batch", "update")
    for name in (*members, "refresh", "attach"):
        assert hasattr(host, name)
        assert not hasattr(loader, name)
    assert host.read_batch([3, 1])["number"].tolist() == [3, 1]


def test_refusals_name_the_cause(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size must be the dataset's, 8, got 16"):
        make(corpus, dataset=StreamingDataset(local=str(corpus), batch_size=8))
    with pytest.raises(ConfigError, match=r"config must be a SlapConfig, got {'keep': 0.7}; write"):
        make(corpus, config={"keep": 0.7})
    for name, value in (("num_workers", 1.5), ("num_workers", -1), ("prefetch_factor", 0)):
        with pytest.raises(ConfigError, match=rf"{name} must be a whole number >= \d, got {value}"):
            make(corpus, **{"num_workers": 1, name: value})
    with pytest.raises(
        ConfigError, match="collate_fn must be a function of a list of samples, got 3"
    ):
        make(corpus, collate_fn=3)
    with pytest.raises(ConfigError, match=r"at most lookahead = 4, got 3 \* 2"):
        make(corpus, num_workers=2, prefetch_factor=3)
    with pytest.raises(AlignmentError, match=r"399 rows"):
        make(corpus, embeddings=vectors(399))
    with pytest.raises(AlignmentError):
        make(corpus, embeddings=str(tmp_path / "none.zarr"))
    with pytest.raises(TypeError, match=r"streaming.StreamingDataset, got list"):
        make(corpus, dataset=[1, 2, 3])
    with pytest.raises(TypeError, match="collate_fn must make a mapping, got list"):
        next(iter(make(corpus, collate_fn=list)))


def test_a_state_of_another_batch_size_is_refused_as_such(corpus: Path) -> None:
    loader = make(corpus)
    next(iter(loader))
    half = StreamingDataset(local=str(corpus), batch_size=BATCH // 2)
    other = make(corpus, dataset=half, batch_size=BATCH // 2)
    with pytest.raises(StateError, match=f"global_batch: {BATCH} -> {BATCH // 2}"):
        other.load_state_dict(loader.state_dict())


def test_a_state_of_another_dataset_is_refused(corpus: Path, tmp_path: Path) -> None:
    state = make(corpus).state_dict()
    other = make(write_corpus(tmp_path / "other", first=1))
    with pytest.raises(StateError, match="index_digests must be those of this dataset"):
        other.load_state_dict(state)
    with pytest.raises(StateError, match="version must be 6, got 4"):
        other.load_state_dict({**state, "version": 4})


def test_iterating_on_after_loading_a_state_is_an_error(corpus: Path) -> None:
    loader = make(corpus)
    batches = iter(loader)
    next(batches)
    loader.load_state_dict(loader.state_dict())
    with pytest.raises(RuntimeError, match="start a new iteration"):
        next(batches)


def test_losses_may_be_tensors_of_any_float_type(corpus: Path) -> None:
    loader = make(corpus)
    batches = iter(loader)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        batch = next(batches)
        loader.observe(batch["sample_id"], torch.ones(BATCH, dtype=dtype, requires_grad=True))
    assert loader.metrics()["observed"] == 3 * BATCH


def test_weights_of_losses_come_with_the_batch_at_hand(corpus: Path) -> None:
    loader = make(corpus, config=config_of(policy="infobatch", lookahead=4, keep=0.5))
    seen = []
    for _ in range(2):
        for batch in loader:
            weights = loader.loss_weights(batch["sample_id"])
            assert weights.shape == (BATCH,)
            assert weights.dtype == torch.float64
            # Asked again it says the same; batches composed ahead do not matter.
            assert torch.equal(loader.loss_weights(batch["sample_id"].flip(0)), weights.flip(0))
            seen.append(weights)
            feed(loader, batch)
    # Until losses can be predicted all count alike.
    assert torch.all(seen[0] == 1.0)
    assert torch.cat(seen).max() > 1.0
    with pytest.raises(FeedbackError, match="loss_weights: ids of yielded batches"):
        loader.loss_weights(batch["sample_id"])


def test_numpys_whole_numbers_are_whole_numbers(corpus: Path) -> None:
    loader = make(corpus, batch_size=np.int64(BATCH), num_workers=np.int64(0))
    assert run(loader, 2) == run(make(corpus), 2)
