"""Samples of one optimizer step are dealt by length, and nothing else about a run changes."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streaming import StreamingDataset

from slap_stream import SlapConfig, SlapDataLoader
from slap_stream.embeddings.rows import ArrayStore
from slap_stream.errors import ShardError
from slap_stream.loader.dealing import deal_by_length
from tests.laws import FIRM, as_json, config_of
from tests.loader.test_loader import BATCH, LOSSES, NUM_SAMPLES, break_shard, vectors, write_corpus

# Divides the lookahead; an epoch of 17 batches ends in a step of a single one.
STEP = 4
LENGTHS = np.random.default_rng(7).integers(1, 200, NUM_SAMPLES)


@given(data=st.data())
def test_each_lane_keeps_its_samples_and_its_part_and_lengths_fall(data: st.DataObject) -> None:
    batches, lanes, each = (data.draw(st.integers(1, 5)) for _ in range(3))
    shape = batches, lanes * each
    ids = np.random.default_rng(0).permutation(batches * lanes * each).reshape(shape)
    lengths = np.array(data.draw(st.lists(st.integers(0, 9), min_size=ids.size, max_size=ids.size)))
    by_id = lengths.astype(np.float64)
    dealt = deal_by_length(ids, by_id[ids], lanes)
    assert dealt.shape == shape
    for lane in range(lanes):
        part = slice(lane * each, (lane + 1) * each)
        ours = dealt[:, part].ravel()
        assert sorted(ours) == sorted(ids[:, part].ravel())
        assert np.all(np.diff(by_id[ours]) <= 0)
        # The order is one, whatever the divisions.
        alone = deal_by_length(ids[:, part], by_id[ids[:, part]], 1)
        np.testing.assert_array_equal(dealt[:, part], alone)


def test_no_way_to_deal_pads_less() -> None:
    rng = np.random.default_rng(1)

    def width(lengths: Any) -> int:
        return int(lengths.max(axis=1).sum())

    for _ in range(20):
        lengths = rng.integers(1, 50, (4, 3)).astype(float)
        best = width(np.take(lengths, deal_by_length(np.arange(12).reshape(4, 3), lengths, 1)))
        for _ in range(200):
            assert best <= width(rng.permutation(lengths.ravel()).reshape(4, 3))


def collate(samples: list[Any]) -> dict[str, torch.Tensor]:
    """A padded batch, as far as padding goes."""
    numbers = torch.tensor([sample["number"] for sample in samples])
    lengths = torch.tensor(LENGTHS)[numbers]
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return {"number": numbers, "attention_mask": mask.long()}


def make(
    corpus: Path, *, grouping: int = STEP, config: SlapConfig | None = None, **options: Any
) -> SlapDataLoader:
    """A loader whose samples have lengths."""
    config = config or config_of(num_lanes=2, lookahead=STEP, probe_every=100)
    return SlapDataLoader(
        StreamingDataset(local=str(corpus), batch_size=BATCH),
        embeddings=ArrayStore(vectors(), lengths=LENGTHS),
        config=replace(config, length_grouping=grouping),
        collate_fn=collate,
        **options,
    )


def train(
    loader: SlapDataLoader,
    batches: int,
    *,
    found: list[list[int]] | None = None,
    refresh: bool = True,
) -> list[list[int]]:
    """The next batches, fed back, with a refresh after every optimizer step."""
    host, found = loader.probe_host(), [] if found is None else found
    while len(found) < batches:
        for batch in islice(loader, batches - len(found)):
            loader.observe(batch["sample_id"], torch.tensor(LOSSES)[batch["sample_id"]])
            found.append(batch["sample_id"].tolist())
            end = loader.progress == 1.0
            if refresh and (int(loader.metrics()["step"]) % STEP == 0 or end):
                host.refresh()
    return found


def steps(batches: list[list[int]], per_epoch: int) -> list[list[int]]:
    """What each optimizer step was of: sorted ids."""
    epochs = [batches[at : at + per_epoch] for at in range(0, len(batches), per_epoch)]
    groups = [epoch[at : at + STEP] for epoch in epochs for at in range(0, len(epoch), STEP)]
    return [sorted(chain.from_iterable(group)) for group in groups]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpora") / "corpus")


@pytest.fixture(scope="module")
def dealt(corpus: Path) -> list[list[int]]:
    """Two epochs, dealt."""
    loader = make(corpus)
    return train(loader, 2 * len(loader))


def test_an_optimizer_step_trains_on_the_same_samples_with_less_padding(
    corpus: Path, dealt: list[list[int]]
) -> None:
    loader = make(corpus, grouping=1)
    plain, per_epoch = train(loader, len(dealt)), len(loader)
    assert per_epoch % STEP == 1
    assert plain != dealt
    # Feedback included: what is selected does not depend on the order inside of a step.
    assert steps(dealt, per_epoch) == steps(plain, per_epoch)
    again = make(corpus)
    train(again, len(dealt))
    for one, batches in ((loader, plain), (again, dealt)):
        widths = [LENGTHS[batch].max() for batch in batches]
        share = 1 - LENGTHS[np.concatenate(batches)].sum() / (BATCH * np.sum(widths))
        assert one.metrics()["padding_share"] == pytest.approx(share)
    assert again.metrics()["padding_share"] < 0.6 * loader.metrics()["padding_share"]
    assert "padding_share" not in make(corpus).metrics()


@pytest.mark.parametrize(
    ("lookahead", "options"),
    [(STEP, {"num_workers": 2}), (3, {"num_workers": 1, "prefetch_factor": 3})],
)
def test_batches_do_not_depend_on_workers(
    corpus: Path, lookahead: int, options: dict[str, Any]
) -> None:
    config = config_of(num_lanes=2, lookahead=lookahead, probe_every=3)
    plain = train(make(corpus, config=config), 20)
    assert train(make(corpus, config=config, **options), 20) == plain


@pytest.mark.parametrize("lookahead", [0, 3])
def test_resume_is_exact_at_any_batch(corpus: Path, lookahead: int) -> None:
    config = config_of(num_lanes=2, lookahead=lookahead, probe_every=3)
    loader = make(corpus, config=config)
    unbroken = train(loader, 2 * len(loader))
    loader, done = make(corpus, config=config), 0
    for cut in (0, 1, 3, 4, 16, 17, 18):
        assert train(loader, cut - done) == unbroken[done:cut]
        done, state = cut, as_json(loader.state_dict())
        again = make(corpus, config=config)
        again.load_state_dict(state)
        assert as_json(again.state_dict()) == state
        rest = unbroken[cut : cut + 9]
        assert train(again, len(rest)) == rest


def test_with_auto_the_last_step_of_an_epoch_is_dealt_too(corpus: Path) -> None:
    wrong = (np.random.default_rng(1).random((NUM_SAMPLES, 1)) < 0.3).astype(np.float16)
    store = ArrayStore(vectors(), lengths=LENGTHS, features=wrong, feature_names=["mismatch"])
    config = config_of(num_lanes=2, lookahead=STEP, keep="auto", probe_every=100, **FIRM)
    epochs = []
    for grouping in (1, STEP):
        loader = SlapDataLoader(
            StreamingDataset(local=str(corpus), batch_size=BATCH),
            embeddings=store,
            config=replace(config, length_grouping=grouping),
            collate_fn=collate,
        )
        found: list[list[int]] = []
        while loader.epoch == 0:
            found += train(loader, 1)
        assert len(found) < len(loader)
        epochs.append(found)
    plain, dealt = epochs
    assert plain != dealt
    assert steps(dealt, len(dealt)) == steps(plain, len(plain))


@pytest.mark.parametrize(("before", "after"), [(1, STEP), (STEP, 1), (STEP, 6)])
def test_a_run_goes_on_with_another_number_of_batches_in_a_step(
    corpus: Path, before: int, after: int
) -> None:
    loader = make(corpus, grouping=before)
    first = train(loader, 6)
    state = as_json(loader.state_dict())
    again = make(corpus, grouping=after)
    again.load_state_dict(state)
    rest = train(again, len(again) - 6)
    # What was composed comes as it was, and steps count from where the run was taken up.
    assert rest[: len(state["pending"])] == state["pending"]
    assert state["grouping"]["undealt"] == 0
    new = list(range(len(state["pending"]), len(rest)))
    for start in range(0, len(rest), after):
        own = [at for at in range(start, min(start + after, len(rest))) if at in new]
        for lane in range(2):
            part = slice(lane * BATCH // 2, (lane + 1) * BATCH // 2)
            lengths = [LENGTHS[number] for at in own for number in rest[at][part]]
            assert after == 1 or lengths == sorted(lengths, reverse=True)
    trained = np.concatenate(first + rest)
    assert len(np.unique(trained)) == len(trained)


def test_a_step_that_a_bad_shard_has_cut_is_dealt_once_it_is_whole(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    options = {"num_lanes": 1, "lookahead": 1, "pool_batches": 2, "shards_per_block": 1}
    whole = make(corpus, config=config_of(**options, keep=1.0))
    unbroken = train(whole, len(whole), refresh=False)
    order = whole.sampler.lanes[0].intake.order
    (broken,) = order.shards_of_block(order.num_blocks // 2)
    path = corpus / f"shard.{broken:05}.mds"
    intact = path.read_bytes()
    break_shard(corpus, path.name)
    loader = make(corpus, config=config_of(**options, keep=1.0))
    found: list[list[int]] = []
    with pytest.raises(ShardError):
        train(loader, len(whole), found=found, refresh=False)
    state = as_json(loader.state_dict())
    assert 0 < state["grouping"]["undealt"] <= len(state["pending"])
    path.write_bytes(intact)
    again = make(corpus, config=config_of(**options, keep=1.0))
    again.load_state_dict(state)
    assert found + train(again, len(unbroken) - len(found), refresh=False) == unbroken
