"""What DeepSpeed's optimizers know of a parameter: asked for only when all ranks can answer.

Without DeepSpeed; `test_sharded` has the real one where it is installed.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from slap_stream.integrations.zero_state import ZeroOptimizer
from slap_stream.probe.second_moment import SecondMoment

SHAPE = (5, 3)


class Engine:
    """An engine whose optimizer holds the parameter in a flat piece, as ZeRO does."""

    def __init__(self, *, trained: bool = True, keys: tuple[str, ...] = ("exp_avg_sq",)) -> None:
        self.module = torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False)
        self.module.weight.requires_grad_(trained)
        self.whole = torch.rand(SHAPE)
        pieces = {0: {key: self.whole.flatten() for key in keys}}
        self.optimizer: Any = SimpleNamespace(optimizer=SimpleNamespace(state=pieces))
        # As after a checkpoint was loaded.
        self.global_steps, self.skipped_steps = 8, 1


class Asked:
    """Stands for DeepSpeed: a collective, of which every call is written down."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.keys = engine, list[str]()

    def __call__(self, parameter: Any, key: str) -> torch.Tensor:
        assert parameter is self.engine.module.weight
        self.keys.append(key)
        return self.engine.whole


def asked_of(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> tuple[Asked, SecondMoment]:
    asked = Asked(engine)
    utils = ModuleType("deepspeed.utils")
    utils.safe_get_full_optimizer_state = asked  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    monkeypatch.setitem(sys.modules, "deepspeed.utils", utils)
    moment = SecondMoment(
        SHAPE,
        decay=0.9,
        device=torch.device("cpu"),
        weight=engine.module.weight,
        optimizer=ZeroOptimizer(engine),
    )
    return asked, moment


def test_the_second_moment_is_that_of_the_whole_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    asked, moment = asked_of(engine, monkeypatch)
    engine.global_steps += 1
    left, right = moment.factors()
    assert moment.from_optimizer
    assert asked.keys == ["exp_avg_sq"]
    mean = engine.whole.mean()
    torch.testing.assert_close(left, (engine.whole.mean(1) / mean + 1) ** -0.25)
    torch.testing.assert_close(right, (engine.whole.mean(0) / mean + 1) ** -0.25)


def test_before_a_step_is_taken_no_rank_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    asked, moment = asked_of(engine, monkeypatch)
    moment.factors()
    # A step whose gradients overflowed leaves the pieces as they were.
    engine.global_steps += 1
    engine.skipped_steps += 1
    moment.factors()
    assert not moment.from_optimizer
    assert asked.keys == []


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (Engine(keys=("exp_avg",)), "keeps no second moment of the head that we know (exp_avg)"),
        (Engine(trained=False), "the head's weight is not trained in the optimizer"),
    ],
)
def test_what_is_not_known_is_said_without_asking(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    engine: Engine,
    message: str,
) -> None:
    asked, moment = asked_of(engine, monkeypatch)
    engine.global_steps += 1
    with caplog.at_level("WARNING", "slap_stream"):
        moment.factors()
    assert not moment.from_optimizer
    assert message in caplog.text
    assert asked.keys == []


def test_without_zero_the_optimizer_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    engine.optimizer = torch.optim.AdamW(engine.module.parameters())
    asked, moment = asked_of(engine, monkeypatch)
    engine.module(torch.ones(1, SHAPE[1])).sum().backward()
    engine.optimizer.step()
    engine.global_steps += 1
    moment.factors()
    assert moment.from_optimizer
    assert asked.keys == []
