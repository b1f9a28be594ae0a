"""Each sample's loss, from the forward of the training step and from no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, Trainer
from transformers.modeling_outputs import CausalLMOutputWithPast

from slap_stream.errors import ConfigError
from slap_stream.integrations.mixin import SlapMixin
from slap_stream.integrations.trainer_forward import TrainingForward
from slap_stream.probe.readout import per_sample_loss
from tests.helpers.probe_host import one_thread  # noqa: F401  (a fixture)
from tests.integrations.test_transformers import COLLATE, Recording, arguments, make, new_model
from tests.laws import config_of
from tests.test_training import folder  # noqa: F401  (a fixture)

NO_PROBE = config_of(num_lanes=1, lookahead=2, probe_fraction=0.0)


class Fused(LlamaForCausalLM):
    """As Liger's kernels make it: no logits where there are labels, while it trains."""

    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None, **rest: Any):
        if not self.training or labels is None:
            return super().forward(input_ids, attention_mask, labels=labels, **rest)
        states = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        # The head itself is not called.
        logits = states[:, :-1] @ self.lm_head.weight.T
        total = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        return CausalLMOutputWithPast(loss=total / rest["num_items_in_batch"])


def as_class(trainer: Recording, kind: type) -> Recording:
    """The trainer, with its model of another class."""
    trainer.model.__class__ = kind
    return trainer


@pytest.mark.parametrize("settings", [{}, {"bf16": True}], ids=["fp32", "bf16"])
def test_a_fused_loss_feeds_back_what_logits_would(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Accelerate keeps it in the environment, where it would outlive the test.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    settings = {"max_steps": 4, "gradient_accumulation_steps": 2, **settings}
    plain = make(folder, tmp_path, **settings)
    plain.train()
    fused = as_class(make(folder, tmp_path, **settings), Fused)
    fused.train()
    assert fused.probe is not None
    assert fused.probe.metrics()["probe_steps"] == 4
    assert fused.ids == plain.ids
    for ours, theirs in zip(fused.samples, plain.samples, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2 if "bf16" in settings else 1e-4, atol=0)


def test_a_fused_loss_of_a_lora_model_is_read_at_its_head(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    from peft import LoraConfig, get_peft_model

    samples = []
    for kind in (LlamaForCausalLM, Fused):
        model = new_model(folder)
        model.__class__ = kind
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        trainer = make(folder, tmp_path, config=NO_PROBE, max_steps=2)
        trainer.model = trainer.model_wrapped = model
        trainer.train()
        samples.append(torch.cat(trainer.samples))
    torch.testing.assert_close(*samples)


def test_a_batch_costs_one_forward(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    trainer = make(folder, tmp_path, config=NO_PROBE, max_steps=3)
    forwards: list[Any] = []
    trainer.model.register_forward_hook(lambda *call: forwards.append(call[2]))
    hooks = len(trainer.model._forward_hooks), len(trainer.model.model._forward_hooks)
    trainer.train()
    assert len(forwards) == len(trainer.ids) == 3
    assert hooks == (len(trainer.model._forward_hooks), len(trainer.model.model._forward_hooks))


class Twice(Trainer):
    """R-Drop, say: two forwards of one batch, which differ by dropout."""

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        return model(**inputs)["loss"] + model(**inputs)["loss"]


class Around(Trainer):
    """Calls what is inside the model, which no hook on the model sees."""

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        return model.forward(**inputs)["loss"]


class Looking(Trainer):
    """A second forward, to look at."""

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        with torch.no_grad():
            model(input_ids=1 - inputs["input_ids"].clamp(max=1))
        return super().compute_loss(model, inputs, *rest, **options)


class Scaling(Trainer):
    """As the stock Trainer does with several ranks: the model's own loss is changed in place."""

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        loss = super().compute_loss(model, inputs, *rest, **options)
        loss *= 4.0
        return loss


def mixed(folder: Path, out: Path, kind: type, *also: type) -> Any:  # noqa: F811
    """A trainer of a class that the mixin is mixed with."""
    plain = make(folder, out, max_steps=1)
    return type("Mixed", (*also, SlapMixin, kind), {})(
        plain.model,
        arguments(out, max_steps=1),
        COLLATE,
        plain.train_dataset,
        embeddings=folder / "corpus" / "embeddings.zarr",
        slap_config=NO_PROBE,
    )


@pytest.mark.parametrize(("kind", "calls"), [(Twice, 2), (Around, 0)])
def test_losses_are_of_one_forward_or_of_the_users_making(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    kind: type,
    calls: int,
) -> None:
    with pytest.raises(ConfigError, match=f"got {calls} calls; .* override sample_losses"):
        mixed(folder, tmp_path, kind).train()
    seen: list[Any] = []

    class Own(SlapMixin):
        def sample_losses(self, outputs: Any, labels: Any) -> Any:
            seen.append(outputs)
            return torch.ones(len(labels))

    trainer = mixed(folder, tmp_path, kind, Own)
    trainer.train()
    assert [len(outputs) for outputs in seen] == [calls]
    assert trainer.loader.metrics()["observed"] == len(seen) * trainer.args.train_batch_size


@pytest.mark.parametrize("kind", [Looking, Scaling])
def test_what_a_trainer_does_besides_is_none_of_the_feedback(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    kind: type,
) -> None:
    plain = make(folder, tmp_path, config=NO_PROBE, max_steps=1)
    plain.train()

    class Keeping(SlapMixin):
        def sample_losses(self, outputs: Any, labels: Any) -> Any:
            self.seen = super().sample_losses(outputs, labels)
            return self.seen

    trainer = mixed(folder, tmp_path, kind, Keeping)
    trainer.train()
    torch.testing.assert_close(trainer.seen, plain.samples[0])


class Overwriting(LlamaForCausalLM):
    """As a kernel that makes gradients in the place of the logits."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        output = super().forward(*inputs, **named)
        output.logits.data.mul_(0.1)
        return output


class Weighted(Fused):
    """A model with a loss of its own, and no logits."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        output = super().forward(*inputs, **named)
        return {"loss": 2.0 * output.loss}


class Balanced(Weighted):
    """A model whose loss holds what no sample costs."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return {**super().forward(*inputs, **named), "aux_loss": torch.ones(())}


@pytest.mark.parametrize("kind", [Overwriting, Weighted])
def test_losses_that_are_not_the_models_are_refused_on_the_first_batch(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    kind: type,
) -> None:
    trainer = as_class(make(folder, tmp_path, config=NO_PROBE, max_steps=2), kind)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(30.0)
    with pytest.raises(ConfigError, match=r"must make up the model's own loss, got a mean of"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_balance_of_experts_is_no_samples_loss(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    trainer = as_class(make(folder, tmp_path, config=NO_PROBE, max_steps=1), Balanced)
    trainer.train()
    assert len(trainer.samples) == 1


class Bodiless(nn.Module):
    """A loss, and nothing that it is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, input_ids: Any, labels: Any, **rest: Any) -> Any:
        return {"loss": self.weight * 1.0}


def test_a_model_that_shows_neither_logits_nor_states_is_refused(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    trainer = make(folder, tmp_path, config=NO_PROBE, max_steps=1)
    trainer.model = trainer.model_wrapped = Bodiless()
    with pytest.raises(ConfigError, match=r"hold logits, .* got dict .* 0 calls; .*use_liger_ker"):
        trainer.train()


class Body(nn.Module):
    """Returns its states as nobody else does."""

    def __init__(self, pack: Any) -> None:
        super().__init__()
        self.embed, self.pack = nn.Embedding(10, 4), pack

    def forward(self, input_ids: Any) -> Any:
        return self.pack(self.embed(input_ids))


class Whole(nn.Module):
    """A model around such a body."""

    def __init__(self, pack: Any, unpack: Any, *, fused: bool = False) -> None:
        super().__init__()
        self.base_model, self.lm_head = Body(pack), nn.Linear(4, 10)
        self.unpack, self.fused = unpack, fused

    def forward(self, input_ids: Any) -> Any:
        logits = self.lm_head(self.unpack(self.base_model(input_ids)))
        return {"loss": logits.sum()} if self.fused else {"logits": logits}


PACKS = [
    (lambda h: {"hidden": h}, lambda out: out["hidden"]),
    (lambda h: ((h, h), None), lambda out: out[0][0]),
    (lambda h: (), lambda out: torch.zeros(2, 5, 4)),
]


@pytest.mark.parametrize(("pack", "unpack"), PACKS, ids=["dict", "tuples", "nothing"])
def test_a_body_may_return_anything_where_there_are_logits(pack: Any, unpack: Any) -> None:
    ids = torch.arange(10).view(2, 5)
    model, forward = Whole(pack, unpack), TrainingForward()
    with forward.watched(model, None):
        model(ids)
        losses = forward.losses(forward.outputs, ids)
    torch.testing.assert_close(losses, per_sample_loss(model(ids)["logits"], ids))
    model = Whole(pack, unpack, fused=True)
    with forward.watched(model, None):
        model(ids)
        with pytest.raises(ConfigError, match=r"or its body must return the hidden states first"):
            forward.losses(forward.outputs, ids)
