"""Models that a Trainer shards: the same training as with DDP, probed alike, resumed exactly.

In two real processes, which `sharded_run` starts, over gloo and on CPUs.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from slap_stream import SlapConfig
from slap_stream.errors import ConfigError
from slap_stream.integrations.trainer_checks import check_sharding
from tests.helpers.sharded_run import PROCESSES
from tests.loader.test_loader import write_corpus
from tests.loader.test_ranks import run_module

Results = list[dict[str, Any]]
# 17 batches an epoch of this corpus.
BATCHES = 17


def run(folder: Path, scenario: str) -> Results:
    """What each of the processes has found."""
    corpus = write_corpus(folder / "corpus")
    run_module("tests.helpers.sharded_run", corpus, folder, scenario)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Of DDP and FSDP2."""
    return run(tmp_path_factory.mktemp("fsdp"), "fsdp")


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Of DDP and DeepSpeed, which no test environment requires."""
    if find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    return run(tmp_path_factory.mktemp("deepspeed"), "deepspeed")


def check_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Up to the order in which gradients are added up, both are the same training."""
    assert one["ids"] == other["ids"]
    assert len(one["ids"]) == BATCHES
    for name in ("losses", "norms", "evaluated", "factors", "sketch"):
        for mine, others in zip(one[name], other[name], strict=True):
            np.testing.assert_allclose(mine, others, rtol=1e-3, atol=1e-5, err_msg=name)
    for name in ("probe_samples", "probe_moment_from_optimizer", "probe_moment_fallback"):
        assert one["metrics"][name] == other["metrics"][name]
    assert one["metrics"]["probe_moment_from_optimizer"] == 1
    assert one["metrics"]["probe_samples"] > 0


def check_resumed(result: dict[str, Any], name: str) -> None:
    """What came of a checkpoint is, bit for bit, what came of the training that left it."""
    whole, rest = result[name], result[f"{name} resumed"]
    assert 0 < len(rest["ids"]) < len(whole["ids"])
    for key in ("ids", "losses"):
        assert rest[key] == whole[key][-len(rest[key]) :]
    for key in ("norms", "evaluated", "steps", "factors", "sketch"):
        assert rest[key] == whole[key]
    for key in ("probe_samples", "trained", "pruned"):
        assert rest["metrics"][key] == whole["metrics"][key]


def test_with_fsdp_a_training_is_the_one_with_ddp(fsdp: Results) -> None:
    for result in fsdp:
        assert result["ddp"]["wrapped"] == "DistributedDataParallel"
        assert result["full"]["wrapped"] == "FSDPLlamaForCausalLM"
        assert len(result["full"]["evaluated"]) == 3
        check_alike(result["full"], result["ddp"])


def test_with_fsdp_trls_training_is_the_one_with_ddp_and_resumed_exactly(fsdp: Results) -> None:
    if find_spec("trl") is None:
        pytest.skip("trl is an extra")
    for result in fsdp:
        assert result["trl"]["wrapped"] == "FSDPLlamaForCausalLM"
        check_alike(result["trl"], result["trl ddp"])
        check_resumed(result, "trl")
        assert result["trl"]["resting"] == []


@pytest.mark.parametrize("name", ["full", "sharded"])
def test_with_fsdp_a_resumed_training_equals_the_unbroken_one(fsdp: Results, name: str) -> None:
    for result in fsdp:
        check_resumed(result, name)
        assert result[name]["metrics"]["probe_moment_from_optimizer"] == 1


def test_all_ranks_come_to_the_same_sketches(fsdp: Results) -> None:
    for name in ("full", "sharded"):
        first, second = (result[name] for result in fsdp)
        assert first["factors"] == second["factors"]
        assert first["sketch"] == second["sketch"]


def test_a_head_that_is_sharded_again_at_once_is_read_like_a_whole_one(fsdp: Results) -> None:
    for result in fsdp:
        found = result["head alone"]
        np.testing.assert_allclose(found["sharded"], found["whole"], rtol=1e-4, atol=1e-5)


def test_a_fused_loss_is_fed_back_where_the_head_is_gathered_and_refused_where_it_is_not(
    fsdp: Results,
) -> None:
    for result in fsdp:
        check_alike(result["fused"], result["full"])
        found = result["head alone"]
        assert found["whole fused"] == ""
        assert found["sharded fused"].startswith("the head's weight must be whole after a forward")


def test_nothing_stays_gathered_after_a_probe(fsdp: Results) -> None:
    for result in fsdp:
        assert result["full"]["resting"] == result["sharded"]["resting"] == []
        assert result["head alone"]["sharded resting"] == []
        assert result["head alone"]["whole resting"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not sharded", "fsdp must be off where accelerate does not shard, got"),
        ("version", "fsdp_config['version'] must be 2, got 1; FSDP1 keeps"),
        ("offload", "fsdp_config['cpu_offload'] must be False, got True; the probe takes"),
        ("compiled", "torch_compile must be off with fsdp or deepspeed, got True; what"),
    ],
)
def test_ways_of_sharding_that_cannot_be_honoured_are_refused_by_name(
    fsdp: Results, name: str, message: str
) -> None:
    for result in fsdp:
        assert message in result["errors"][name]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_with_deepspeed_a_training_is_the_one_with_ddp(deepspeed: Results, stage: int) -> None:
    for result in deepspeed:
        assert result[f"zero {stage}"]["wrapped"] == "DeepSpeedEngine"
        check_alike(result[f"zero {stage}"], result["ddp"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_with_deepspeed_trls_training_is_the_one_with_ddp_and_resumed_exactly(
    deepspeed: Results, stage: int
) -> None:
    if find_spec("trl") is None:
        pytest.skip("trl is an extra")
    for result in deepspeed:
        check_alike(result[f"trl zero {stage}"], result["trl ddp"])
        check_resumed(result, f"trl zero {stage}")


@pytest.mark.parametrize("name", ["zero 1", "zero 2", "zero 3", "auto"])
def test_with_deepspeed_a_resumed_training_equals_the_unbroken_one(
    deepspeed: Results, name: str
) -> None:
    for result in deepspeed:
        check_resumed(result, name)


def test_a_schedule_that_deepspeed_makes_by_steps_is_refused_with_auto(deepspeed: Results) -> None:
    for result in deepspeed:
        message = (
            "deepspeed must leave out \"scheduler\" with keep=\"auto\", got {'type': 'WarmupLR'"
        )
        assert message in result["errors"]["scheduler"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel": 2}, "parallelism_config and tp_plan must be off: ranks that share"),
        ({"parallelism": object()}, "parallelism_config and tp_plan must be off: ranks that share"),
        ({"fsdp_config": {"xla": True}}, r"fsdp_config\['xla'\] must be False, got True"),
    ],
)
def test_what_is_not_for_these_machines_is_refused_by_name(
    settings: dict[str, Any], message: str
) -> None:
    """As a Trainer looks then, which cannot be made here."""
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(fsdp=True, fsdp_config=settings.get("fsdp_config")),
        accelerator=SimpleNamespace(parallelism_config=settings.get("parallelism")),
        get_tp_size=lambda: settings.get("tensor_parallel", 1),
    )
    with pytest.raises(ConfigError, match=message):
        check_sharding(trainer, SlapConfig())
