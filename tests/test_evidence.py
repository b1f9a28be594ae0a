"""What can be spared: how likely a copy is, what is left of a candidate's worth, who pays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slap_stream import SlapSampler
from slap_stream.embeddings import ArrayStore
from slap_stream.evidence import NO_COPY, SURE_COPY, copy_likelihood, worth
from tests.laws import LossTable, config_of, drive, hold_epoch_laws
from tests.test_sampler import embeddings, make


def test_near_ones_are_copies_and_far_ones_are_not() -> None:
    distance = np.array([0.0, SURE_COPY, 0.4, NO_COPY, 1.0, np.inf])
    same, sure, near, edge, far, never_seen = copy_likelihood(distance)
    assert same == sure == 1.0
    assert 0.0 < near < 1.0
    assert edge == far == never_seen == 0.0


@given(copy=st.floats(0, 1), mismatch=st.floats(0, 1), more=st.floats(0, 1))
def test_either_reason_takes_worth_away(copy: float, mismatch: float, more: float) -> None:
    (base,) = worth(np.array([copy]), np.array([mismatch]))
    assert 0.0 <= base <= 1.0
    assert worth(np.array([max(copy, more)]), np.array([mismatch]))[0] <= base
    assert worth(np.array([copy]), np.array([max(mismatch, more)]))[0] <= base
    assert worth(np.array([1.0]), np.array([mismatch]))[0] == 0.0
    assert worth(np.zeros(1), np.zeros(1))[0] == 1.0


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_auto_keeps_what_is_not_shown_to_be_dispensable(share: float) -> None:
    sampler = make([100] * 40, batch_size=16, mismatched=share, keep="auto", temperature=0.05)
    ids = np.arange(4000)
    wrong = sampler._store.read_ids(ids).feature[:, 0] > 0
    batches = drive([sampler], LossTable(4000, 16))
    hold_epoch_laws(sampler, batches)
    trained = np.isin(ids, np.concatenate(batches))
    # It starts by keeping everything, and follows.
    assert trained.mean() == pytest.approx(1.0 - share, abs=0.04)
    if share:
        assert trained[~wrong].mean() > 0.97
        assert trained[wrong].mean() < 0.2
        assert sampler.metrics()["keep"] == pytest.approx(1.0 - share, abs=0.03)
    else:
        assert len(batches) >= 0.98 * len(sampler)


def test_strata_of_copies_yield_their_slots_to_others() -> None:
    # Half of source 1 belongs to other prompts, nothing of source 0 does.
    source = np.arange(4000) % 2
    wrong = (source == 1) & (np.arange(4000) % 4 == 1)
    store = ArrayStore(
        embeddings(4000),
        features=wrong[:, None].astype(np.float16),
        feature_names=["mismatch"],
        sources=source.astype(np.int16),
    )
    config = config_of(keep=0.7, num_clusters=1, temperature=0.05)
    sampler = SlapSampler([100] * 40, store, batch_size=32, config=config)
    trained = np.isin(np.arange(4000), np.concatenate(drive([sampler], LossTable(4000, 16))))
    assert trained[wrong].mean() < 0.1
    # 0.7 of all, and three in four are worth it: what is pruned beyond is shared out fairly.
    assert trained[source == 0].mean() == pytest.approx(0.7 / 0.75, abs=0.02)
    assert trained[(source == 1) & ~wrong].mean() == pytest.approx(0.7 / 0.75, abs=0.04)
