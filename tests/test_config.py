"""Settings: what is refused, with which words, and how saved ones are compared."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slap_stream.config import RUNNING, Advanced, SlapConfig
from slap_stream.errors import ConfigError, SlapStreamError

WHOLE = {
    "seed": 0,
    "num_lanes": 1,
    "lookahead": 0,
    "length_grouping": 1,
    "num_clusters": 1,
    "shards_per_block": 1,
    "pool_batches": 2,
    "probe_every": 1,
    "metric_dim": 1,
    "warmup_losses": 1,
    "shortlist": 1,
    "recent_per_stratum": 1,
    "sketch_dim": 16,
}
WEIGHTS = [
    *("rank_weight", "copy_weight", "mismatch_weight", "target_weight"),
    *("curvature", "diversity"),
]
ADVANCED = [field.name for field in dataclasses.fields(Advanced)]


def config_of(setting: str, value: Any) -> SlapConfig:
    """The defaults but for one setting, where it belongs."""
    if setting in ADVANCED:
        return SlapConfig(advanced=Advanced(**{setting: value}))
    return SlapConfig(**{setting: value})


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("keep", 0.0, r'keep must be in \(0, 1\] or "auto", got 0\.0; it is the fraction'),
        ("keep", 1.01, r'keep must be in \(0, 1\] or "auto", got 1\.01'),
        ("keep", math.nan, r'keep must be in \(0, 1\] or "auto", got nan'),
        ("keep", "most", r'keep must be in \(0, 1\] or "auto", got .most.'),
        ("keep_min", 0.0, r"keep_min must be in \(0, 1\], got 0\.0"),
        ("steps", "equal", "steps must be one of fewer, full, got 'equal'"),
        ("policy", "", "policy must be the name of a policy, got ''; such as"),
        ("policy", None, "policy must be the name of a policy, got None"),
        ("on_bad_shard", "ignore", "on_bad_shard must be one of raise, skip, got 'ignore'"),
        ("length_grouping", True, "got True; it is the batches of an optimizer step: write"),
        ("sketch_dim", 100, "sketch_dim must be a power of two, got 100; try 512"),
        ("pool_batches", 1, "pool_batches must be at least 2, got 1; .* nothing to choose from"),
        ("probe_fraction", 1.5, r"probe_fraction must be in \[0, 1\], got 1\.5"),
        ("probe_fraction", -0.1, r"probe_fraction must be in \[0, 1\], got -0\.1"),
        ("decay", 0.0, r"decay must be in \(0, 1\], got 0\.0"),
        ("seed", 2**63, r"seed must be below 2\*\*63, got 9223372036854775808"),
        ("rank_cap", 1.1, r"rank_cap must be in \(0, 1\], got 1\.1"),
        ("max_withdrawn", 1.1, r"max_withdrawn must be in \[0, 1\], got 1\.1"),
        ("max_withdrawn", -0.1, r"max_withdrawn must be in \[0, 1\], got -0\.1"),
        (
            "advanced",
            {"shortlist": 3},
            r"advanced must be an Advanced, got {'shortlist': 3}; write",
        ),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(setting: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config_of(setting, value)


def test_a_sample_is_not_to_be_seen_too_often_in_an_epoch() -> None:
    words = r'must be at least 0.25 with steps="full", got 0\.2; else .* more than 4 times an epoch'
    with pytest.raises(ConfigError, match=f"keep {words}"):
        SlapConfig(keep=0.2, steps="full")
    with pytest.raises(ConfigError, match=f"keep_min {words}"):
        SlapConfig(keep="auto", keep_min=0.2, steps="full")
    # Each counts where it is in force.
    SlapConfig(keep=0.25, keep_min=0.2, steps="full")
    SlapConfig(keep="auto", keep_min=0.2)


@pytest.mark.parametrize("setting", WHOLE)
@pytest.mark.parametrize("value", [-1, 1.0, True, "3"])
def test_a_count_must_be_a_whole_number(setting: str, value: Any) -> None:
    with pytest.raises(
        ConfigError, match=rf"{setting} must be a whole number >= .*, got {value!r}"
    ):
        config_of(setting, value)


@pytest.mark.parametrize("setting", WEIGHTS)
def test_a_weight_must_not_be_negative(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"{setting} must not be negative, got -0.1; 0 switches"):
        config_of(setting, -0.1)


@pytest.mark.parametrize("setting", [*WEIGHTS, "keep_min", "probe_fraction", "max_withdrawn"])
@pytest.mark.parametrize("value", [math.nan, math.inf, True, "0.7"])
def test_a_quantity_must_be_a_finite_number(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{setting} must be a finite number, got {value!r}"):
        config_of(setting, value)


def test_the_ends_of_every_range_are_allowed() -> None:
    SlapConfig.from_dict(WHOLE | dict.fromkeys(WEIGHTS, 0.0))
    SlapConfig.from_dict({"keep": 1, "keep_min": 1.0, "decay": 1.0, "rank_cap": 1.0})
    SlapConfig(probe_fraction=0, max_withdrawn=0)
    SlapConfig(probe_fraction=1, max_withdrawn=1)


def test_numbers_of_numpy_are_taken_as_plain_ones() -> None:
    config = SlapConfig(
        keep=np.float32(0.5),
        keep_min=np.float64(0.25),
        seed=np.int64(7),
        num_lanes=np.uint8(2),
        probe_fraction=np.float16(0.125),
        advanced=Advanced(shortlist=np.int32(3), rank_weight=np.float64(0.5), copy_weight=2),
    )
    settings = config.to_dict()
    assert {type(value) for value in settings.values()} == {int, float, str}
    assert json.loads(json.dumps(settings)) == settings
    assert config == SlapConfig(
        keep=0.5,
        keep_min=0.25,
        seed=7,
        num_lanes=2,
        probe_fraction=0.125,
        advanced=Advanced(shortlist=3, rank_weight=0.5, copy_weight=2.0),
    )
    for value in (np.bool_(True), np.float64(1.0)):
        with pytest.raises(ConfigError, match="seed must be a whole number >= 0, got"):
            SlapConfig(seed=value)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="keep_min must be a finite number, got"):
        SlapConfig(keep_min=np.bool_(True))  # type: ignore[arg-type]


def test_a_setting_of_the_method_says_where_it_belongs() -> None:
    with pytest.raises(
        TypeError, match=r"curvature must be given .*advanced=Advanced\(curvature=0.5"
    ):
        SlapConfig(seed=1, curvature=0.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'temperature'"):
        SlapConfig(temperature=0.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'keep'"):
        Advanced(keep=0.5)  # type: ignore[call-arg]


def test_no_setting_stands_in_both_places() -> None:
    surface = {field.name for field in dataclasses.fields(SlapConfig)}
    assert not surface & set(ADVANCED)
    assert set(SlapConfig().to_dict()) == surface - {"advanced"} | set(ADVANCED)


def test_an_error_is_also_the_builtin_that_callers_expect() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, SlapStreamError)


def test_settings_cannot_change_and_must_be_named() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SlapConfig().keep = 0.5  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Advanced().decay = 0.5  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        SlapConfig(0.5)  # type: ignore[misc]


@given(
    keep=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**63 - 1),
    lanes=st.none() | st.integers(1, 9),
    weight=st.none() | st.floats(0.0, 9.0),
)
def test_settings_survive_a_checkpoint(
    keep: float, seed: int, lanes: int | None, weight: float | None
) -> None:
    config = SlapConfig(
        keep=keep, seed=seed, num_lanes=lanes, advanced=Advanced(rank_weight=weight)
    )
    saved = json.loads(json.dumps(config.to_dict()))
    assert SlapConfig.from_dict(saved) == config
    assert config.differences(saved) == []
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_differences_name_old_and_new() -> None:
    saved = SlapConfig(keep=0.5).to_dict()
    del saved["shortlist"]
    assert SlapConfig(seed=3).differences(saved) == [
        "keep: 0.5 -> 0.7",
        "seed: 0 -> 3",
        "shortlist: None -> 2",
    ]


def test_settings_of_running_may_be_others_when_a_run_goes_on() -> None:
    saved = SlapConfig().to_dict()
    other = SlapConfig(
        lookahead=2,
        length_grouping=4,
        on_bad_shard="skip",
        on_bad_sample="raise",
        max_withdrawn=0.5,
    )
    assert other.differences(saved) == []
    assert {name for name, value in other.to_dict().items() if value != saved[name]} == {*RUNNING}


@pytest.mark.parametrize("settings", [SlapConfig, Advanced])
def test_every_setting_is_documented(settings: type[SlapConfig | Advanced]) -> None:
    for field in dataclasses.fields(settings):
        # Python 3.13 leaves the indentation of the source out, earlier ones do not.
        assert f"\n    {field.name}: " in (inspect.getdoc(settings) or "")
