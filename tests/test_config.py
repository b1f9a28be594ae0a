"""Settings: what is refused, with which words, and how saved ones are compared."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slap_stream.config import SlapConfig
from slap_stream.errors import ConfigError, SlapStreamError

WHOLE = {
    "seed": 0,
    "num_lanes": 1,
    "lookahead": 0,
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
WEIGHTS = ["rank_weight", "copy_weight", "mismatch_weight", "curvature", "diversity"]


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("keep", 0.0, r'keep must be in \(0, 1\] or "auto", got 0\.0; it is the fraction'),
        ("keep", 1.01, r'keep must be in \(0, 1\] or "auto", got 1\.01'),
        ("keep", math.nan, r'keep must be in \(0, 1\] or "auto", got nan'),
        ("keep", "most", r'keep must be in \(0, 1\] or "auto", got .most.'),
        ("keep_min", 0.0, r"keep_min must be in \(0, 1\], got 0\.0"),
        ("policy", "", "policy must be the name of a policy, got ''; such as"),
        ("policy", None, "policy must be the name of a policy, got None"),
        ("on_bad_shard", "ignore", "on_bad_shard must be one of raise, skip, got 'ignore'"),
        ("sketch_dim", 100, "sketch_dim must be a power of two, got 100; try 512"),
        ("pool_batches", 1, "pool_batches must be at least 2, got 1; .* nothing to choose from"),
        ("probe_fraction", 1.5, r"probe_fraction must be in \[0, 1\], got 1\.5"),
        ("probe_fraction", -0.1, r"probe_fraction must be in \[0, 1\], got -0\.1"),
        ("decay", 0.0, r"decay must be in \(0, 1\], got 0\.0"),
        ("seed", 2**63, r"seed must be below 2\*\*63, got 9223372036854775808"),
        ("rank_cap", 1.1, r"rank_cap must be in \(0, 1\], got 1\.1"),
        ("temperature", 0.0, r"temperature must be positive, got 0\.0; a small one"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(setting: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SlapConfig(**{setting: value})


@pytest.mark.parametrize("setting", WHOLE)
@pytest.mark.parametrize("value", [-1, 1.0, True, "3"])
def test_a_count_must_be_a_whole_number(setting: str, value: Any) -> None:
    with pytest.raises(
        ConfigError, match=rf"{setting} must be a whole number >= .*, got {value!r}"
    ):
        SlapConfig(**{setting: value})


@pytest.mark.parametrize("setting", WEIGHTS)
def test_a_weight_must_not_be_negative(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"{setting} must not be negative, got -0.1; 0 switches"):
        SlapConfig(**{setting: -0.1})


@pytest.mark.parametrize("setting", [*WEIGHTS, "keep_min", "probe_fraction", "temperature"])
@pytest.mark.parametrize("value", [math.nan, math.inf, True, "0.7"])
def test_a_quantity_must_be_a_finite_number(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{setting} must be a finite number, got {value!r}"):
        SlapConfig(**{setting: value})


def test_the_ends_of_every_range_are_allowed() -> None:
    SlapConfig(**WHOLE, **dict.fromkeys(WEIGHTS, 0.0))
    SlapConfig(keep=1, keep_min=1.0, probe_fraction=0.15, decay=1.0, rank_cap=1.0)


def test_an_error_is_also_the_builtin_that_callers_expect() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, SlapStreamError)


def test_settings_cannot_change_and_must_be_named() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SlapConfig().keep = 0.5  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        SlapConfig(0.5)  # type: ignore[misc]


@given(
    keep=st.floats(0.01, 1.0), seed=st.integers(0, 2**63 - 1), lanes=st.none() | st.integers(1, 9)
)
def test_settings_survive_a_checkpoint(keep: float, seed: int, lanes: int | None) -> None:
    config = SlapConfig(keep=keep, seed=seed, num_lanes=lanes)
    saved = json.loads(json.dumps(config.to_dict()))
    assert SlapConfig(**saved) == config
    assert config.differences(saved) == []


def test_differences_name_old_and_new() -> None:
    saved = SlapConfig(keep=0.5).to_dict()
    del saved["shortlist"]
    assert SlapConfig(seed=3).differences(saved) == [
        "keep: 0.5 -> 0.7",
        "seed: 0 -> 3",
        "shortlist: None -> 2",
    ]


def test_every_setting_is_documented() -> None:
    documented = SlapConfig.__doc__ or ""
    for field in dataclasses.fields(SlapConfig):
        assert f"        {field.name}: " in documented
