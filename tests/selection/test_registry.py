"""Policies by name: ours, one's own, and those of installed packages; and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slap_stream import Policy, SlapConfig, SlapSampler, register_policy
from slap_stream.embeddings.rows import ArrayStore
from slap_stream.errors import ConfigError, FeedbackError
from slap_stream.selection.policies import registry
from slap_stream.selection.policies.base import PoolView, top
from slap_stream.selection.policies.registry import make_policy
from slap_stream.types import FloatArray, IntArray
from tests.laws import (
    LossTable,
    as_json,
    config_of,
    drive,
    hold_epoch_laws,
    hold_proportionality,
    hold_resume_law,
)


class Surprising(Policy):
    """The largest losses in units of a number of the user's own, `entropy`."""

    needs = frozenset({"losses"})
    measurements = ("entropy",)
    waits_for_losses = True
    measures_all = True
    weighs_losses = True

    def score(self, view: PoolView) -> FloatArray:
        return view.loss / (1.0 + view.measurement("entropy"))

    def select(self, view: PoolView, quota: IntArray) -> IntArray:
        return top(self.score(view), view, int(quota.sum()))

    def loss_weights(self, view: PoolView) -> FloatArray:
        return np.full(len(view), 2.0)


class Entropies(LossTable):
    """The same numbers under the name that `Surprising` asks for."""

    def measured(self, ids: IntArray) -> dict[str, FloatArray]:
        return {"entropy": self.norms[ids], "of no use": ids}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Surprising` under the name "surprising", for one test."""
    monkeypatch.setattr(registry, "_registered", {})
    register_policy("surprising", Surprising)


def make(policy: str = "surprising", *, num_lanes: int = 2, **options: Any) -> SlapSampler:
    """A sampler of 480 samples that measures everything."""
    rows = np.random.default_rng(0).normal(size=(480, 8)).astype(np.float16)
    small: dict[str, Any] = {"probe_fraction": 1.0, "warmup_losses": 16}
    config = config_of(policy=policy, num_lanes=num_lanes, **(small | options))
    return SlapSampler([60] * 8, rows, batch_size=16, config=config)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("num_lanes", [1, 4])
def test_a_policy_of_ones_own_keeps_the_laws(num_lanes: int) -> None:
    table = Entropies(480, 16)
    sampler = make(num_lanes=num_lanes)
    batches = drive([sampler], table)
    hold_epoch_laws(sampler, batches)
    hold_resume_law(lambda: make(num_lanes=num_lanes), table, every=4, epochs=2)


@pytest.mark.usefixtures("registered")
def test_a_policy_of_ones_own_is_told_what_it_asks_for() -> None:
    table = Entropies(480, 16)
    sampler = make(num_lanes=1)
    assert sampler.measurements == ("entropy",)
    batches = drive([sampler], table, stop_after=12)
    pool = sampler.lanes[0].pool
    slots = pool.slots()
    known = ~np.isnan(pool.columns.own_loss[slots])
    expected = np.where(known, table.norms[pool.columns.sample_id[slots]], 0.0)
    assert known.any()
    np.testing.assert_array_equal(pool.measured["entropy"][slots], expected)
    again = make(num_lanes=1)
    again.load_state_dict(as_json(sampler.state_dict()))
    np.testing.assert_array_equal(again.lanes[0].pool.measured["entropy"][slots], expected)
    # What has just been offered takes over slots of others, without their numbers.
    batch = sampler.compose()
    slots = pool.slots()
    new = np.isnan(pool.columns.own_loss[slots])
    assert new.any()
    assert not pool.measured["entropy"][slots[new]].any()
    np.testing.assert_array_equal(sampler.loss_weights(batch), 2.0)
    assert len(batches) == 12


@pytest.mark.usefixtures("registered")
def test_a_measurement_that_is_missing_or_misshapen_is_refused() -> None:
    sampler = make(num_lanes=1)
    sampler.compose()
    ids = sampler.probe_candidates(4)
    with pytest.raises(FeedbackError, match="measurements must hold entropy, got none; the policy"):
        sampler.update(ids, np.ones(4))
    with pytest.raises(FeedbackError, match=r"measurement entropy must be \(4,\) numbers, .* \(3,"):
        sampler.update(ids, np.ones(4), measurements={"entropy": np.ones(3)})
    sampler.update(ids, np.ones(4), measurements={"entropy": np.ones(4)})


def test_an_installed_package_names_its_policies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "shuffling-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shuffling\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[slap_stream.policies]\nshuffled = shuffling_of_a_test:Shuffled\n"
    )
    (tmp_path / "shuffling_of_a_test.py").write_text(
        "from slap_stream.selection.policies.base import SlidingPolicy, top\n"
        "class Shuffled(SlidingPolicy):\n"
        "    def select(self, view, quota):\n"
        "        return top(view.gumbel, view, int(quota.sum()))\n"
    )
    with pytest.raises(ConfigError, match="got 'shuffled'"):
        make("shuffled")
    monkeypatch.syspath_prepend(str(tmp_path))
    sampler = make("shuffled", probe_fraction=0.1)
    hold_epoch_laws(sampler, drive([sampler], LossTable(480, 16)))
    with pytest.raises(
        ConfigError, match=r"policy must be one of slap, .*, uds, shuffled, got 'x'"
    ):
        make("x")


def test_the_example_of_the_docs_keeps_the_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    docs = Path(__file__).parent.parent.parent / "docs" / "selection.md"
    (block,) = re.findall(r"```python\n(.*?)```", docs.read_text(), flags=re.DOTALL)
    scope: dict[str, Any] = {}
    exec(compile(block, str(docs), "exec"), scope)
    assert len(scope["batches"]) == 12
    sampler = make("middling", probe_fraction=0.1)
    table = LossTable(480, 16)
    hold_epoch_laws(sampler, drive([sampler], table))
    hold_proportionality(sampler)


def test_a_name_of_ours_is_not_given_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    for name in ("slap", "", 3):
        with pytest.raises(ConfigError, match="name must be a policy's own, got"):
            register_policy(name, Surprising)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="factory must be a subclass of Policy, or a function"):
        register_policy("mine", Surprising.__name__)  # type: ignore[arg-type]
    register_policy("mine", Surprising)
    # As a notebook does that is run again.
    register_policy("mine", lambda config, columns: Surprising(config, columns))
    assert isinstance(make_policy(SlapConfig(policy="mine")), Surprising)


def test_what_is_no_policy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    register_policy("mine", lambda config, columns: "best first")  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match=r"policy 'mine' must be a slap_stream\.Policy, got 'best"):
        make("mine")

    class Misspelt(Surprising):
        needs = frozenset({"losses", "loses"})

    register_policy("mine", Misspelt)
    with pytest.raises(
        ConfigError, match=r"needs of policy 'mine' must be of losses, .*, got loses"
    ):
        make("mine")


def test_a_policy_that_cannot_work_is_refused_before_any_row_is_read() -> None:
    class Unreadable:
        shape, dtype = (480, 8), np.dtype(np.float16)

        def __getitem__(self, rows: Any) -> Any:
            raise AssertionError("nothing is to be read")

    for settings, words in (
        ({"policy": "best"}, "policy must be one of slap, slap_paper, uniform, .*, got 'best'"),
        ({"policy": "uniform", "keep": "auto"}, "keep must be a number with policy 'uniform', got"),
        ({"probe_fraction": 0.16}, r"probe_fraction must be in \[0, 0\.15\], got 0\.16; probing"),
        ({"policy": "rho_loss"}, "needs the feature column reference_loss, got no columns; embed"),
    ):
        with pytest.raises(ConfigError, match=words):
            SlapSampler([60] * 8, Unreadable(), batch_size=16, config=SlapConfig(**settings))


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("loss", "losses"),
        ("z", "losses"),
        ("typical", "losses"),
        ("utility", "evidence"),
        ("recent", "recent"),
        ("embedding", "embeddings"),
        ("sketch", "sketches"),
        ("chosen", "chosen_sketches"),
        ("reference_loss", "reference_loss"),
    ],
)
def test_a_policy_is_told_what_it_has_declared_and_nothing_else(
    name: str, needs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what is computed for others by chance: it would be of no use on another day."""
    monkeypatch.setattr(registry, "_registered", {})

    class Curious(Faulty):
        needs: frozenset[str] = frozenset()

        def score(self, view: PoolView) -> FloatArray:
            assert getattr(view, name) is not None
            return view.gumbel

    def sampler() -> SlapSampler:
        rows = np.random.default_rng(0).normal(size=(480, 8)).astype(np.float16)
        column = np.ones((480, 1), np.float16)
        store = ArrayStore(rows, features=column, feature_names=["reference_loss"])
        config = config_of(policy="mine", num_lanes=1)
        return SlapSampler([60] * 8, store, batch_size=16, config=config)

    register_policy("mine", Curious)
    with pytest.raises(
        ConfigError, match=rf"needs must hold .*'{needs}'.* reads view\.{name}, got"
    ):
        list(sampler())
    Curious.needs = frozenset({needs})
    assert list(sampler())


def test_only_slap_finds_out_how_much_to_keep() -> None:
    for name in registry.OURS:
        config = SlapConfig(policy=name, keep="auto")
        if name == "slap":
            assert make_policy(config).needs >= {"evidence"}
        else:
            with pytest.raises(ConfigError, match="only policies that need evidence, such as slap"):
                make_policy(config)


def test_the_weight_of_the_rank_follows_the_reference_unless_it_is_given() -> None:
    def weight(columns: list[str], **settings: Any) -> float:
        policy = make_policy(config_of(**settings), columns)
        one = {name: np.zeros(1) for name in ("loss", "copy", "mismatch")}
        return float(policy.utility(rank=np.full(1, 0.5), **one)[0] / 0.5)

    assert weight(["reference_loss"]) == 8.0
    assert weight(["other"]) == 0.4
    assert weight(["reference_loss"], rank_weight=0.5) == 0.5


class Faulty(Surprising):
    """Does what a test has it do wrong."""

    needs = frozenset({"losses"})
    measurements = ()
    waits_for_losses = False
    measures_all = False
    weighs_losses = False
    chosen: Any = None
    scores: Any = None

    def score(self, view: PoolView) -> FloatArray:
        return view.gumbel if self.scores is None else self.scores(view)

    def select(self, view: PoolView, quota: IntArray) -> IntArray:
        picked = top(view.gumbel, view, int(quota.sum()))
        return picked if self.chosen is None else self.chosen(picked)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"chosen": lambda picked: picked * 0}, r"Faulty.select must give 8 positions in \[0, "),
        ({"chosen": lambda picked: picked[:3]}, r"all different, got \(3,\) int64"),
        ({"chosen": lambda picked: picked + 10**6}, r"Faulty.select must give 8 positions"),
        ({"chosen": lambda picked: picked * 1.0}, r"got \(8,\) float64"),
        (
            {"scores": lambda view: view.gumbel * np.nan},
            r"Faulty.score must give \d+ floats without",
        ),
        (
            {"scores": lambda view: view.gumbel[1:]},
            r"must give \d+ floats without NaN, got float64",
        ),
        ({"scores": lambda view: ["a"] * len(view)}, r"Faulty.score must give"),
    ],
)
def test_a_policy_that_breaks_its_word_is_told_which(
    monkeypatch: pytest.MonkeyPatch, fault: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    register_policy(
        "faulty", type("Faulty", (Faulty,), {k: staticmethod(f) for k, f in fault.items()})
    )
    sampler = make("faulty", probe_fraction=0.0)
    with pytest.raises(ConfigError, match=message):
        list(sampler)
