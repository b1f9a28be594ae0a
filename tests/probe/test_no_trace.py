"""Training with a probe whose results nobody uses is, bit for bit, training without one."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from slap_stream.probe.probe import LearnabilityProbe
from tests.helpers.probe_host import Host, softmax_losses, text_batch, vector_batch
from tests.helpers.probe_host import one_thread as one_thread  # a fixture of every test here
from tests.helpers.tiny_models import HIDDEN, VOCABULARY, Classifier, gpt2, llama, qwen2_lora

STEPS = 3
# Of transformers 5; the other name is not in version 4.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")


def loose(model: Any) -> Any:
    """The model with dropout, so that draws tell."""
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    return model


def checkpointed(use_reentrant: bool) -> Any:
    model = gpt2()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    return model


def resized() -> Any:
    model = llama(tie_word_embeddings=True)
    model.resize_token_embeddings(VOCABULARY + 5, mean_resizing=False)
    return model


def widening() -> Any:
    """A model that remembers the longest text that it has met, and reads all by it."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10.0}
    return llama(max_position_embeddings=6, rope_parameters=rope, rope_scaling=rope)


class Int8(nn.Module):
    """A quantised base: whole numbers in buffers, and what is trained beside them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = float(linear.weight.detach().abs().max() / 127)
        self.register_buffer("weight", (linear.weight.detach() / self.scale).round().char())
        self.down = nn.Parameter(0.1 * torch.randn(2, linear.in_features))
        self.up = nn.Parameter(0.1 * torch.randn(linear.out_features, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight * self.scale).T + x @ self.down.T @ self.up.T


def quantised() -> Any:
    model = llama().requires_grad_(False)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, Int8(getattr(layer.self_attn, name)))
    return model


class Merging(nn.Linear):
    """LoRA that is merged in evaluation mode, as some of its libraries do it."""

    def __init__(self) -> None:
        super().__init__(5, HIDDEN)
        self.update = nn.Parameter(0.1 * torch.randn(HIDDEN, 5))
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.update.data
            self.merged = not mode
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + (0.0 if self.merged else x @ self.update.T)


class Repacked(nn.Linear):
    """As 4-bit layers of bitsandbytes do it on CPUs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training and not torch.is_grad_enabled():
            self.weight.data = self.weight.data.bfloat16().float()
        return super().forward(x)


Repacked.__module__ = "bitsandbytes.nn.modules"


def classifier(layer: nn.Module) -> Any:
    """A model of no library's, with a running mean and dropout."""
    model = Classifier()
    model.body = nn.Sequential(layer, nn.BatchNorm1d(HIDDEN), nn.Tanh(), nn.Dropout(0.5))
    return model


TEXT_MODELS: dict[str, Callable[[], Any]] = {
    "attention dropout": lambda: loose(llama()),
    "dropout": gpt2,
    "tied": lambda: llama(tie_word_embeddings=True),
    "resized": resized,
    "lora": qwen2_lora,
    "lora on the head": lambda: qwen2_lora(("q_proj", "lm_head")),
    "a head trained beside lora": lambda: qwen2_lora(modules_to_save=["lm_head"]),
    "checkpointed": lambda: checkpointed(False),
    "checkpointed, reentrant": lambda: checkpointed(True),
    "bfloat16": lambda: llama().bfloat16(),
    "float16": lambda: llama().half(),
    "dynamic rope": widening,
    "quantised": quantised,
}
OTHER_MODELS: dict[str, Callable[[], Any]] = {
    "batch norm": lambda: classifier(nn.Linear(5, HIDDEN)),
    "merged in evaluation": lambda: classifier(Merging()),
    "repacked in evaluation": lambda: classifier(Repacked(5, HIDDEN)),
    "spectral norm": lambda: classifier(
        nn.utils.parametrizations.spectral_norm(nn.Linear(5, HIDDEN))
    ),
}


def careless(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Reads samples that draw, from every generator, and are longer than those of the training."""

    def draw(ids: Any) -> Any:
        torch.rand(1), np.random.rand(), random.random()
        return read(np.asarray(ids) + (4 if read is text_batch else 0))

    return draw


def train(
    model: Any, *, probed: bool, texts: bool = True, autocast: Any = None, compiled: Any = None
) -> dict[str, Any]:
    """All that some steps of a training leave, and the gradients of one more."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(7)
    model.train()
    called = model if compiled is None else torch.compile(model, backend=compiled)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-3
    )
    losses, probe = [], None
    with nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast):
        if probed:
            probe = LearnabilityProbe(
                called,
                Host(read=careless(text_batch if texts else vector_batch), n=2),
                optimizer=optimizer,
                head=None if texts else model.out,
                loss_fn=None if texts else softmax_losses,
            )
    for step in range(STEPS + 1):
        # One region for probe and step, as a user may have it.
        with nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast):
            if probe is not None:
                probe.step()
            if texts:
                batch = text_batch([step % 2, 2 - step % 2])
                del batch["sample_id"]
                loss = called(**batch).loss
            else:
                loss = softmax_losses(called, vector_batch(list(range(8)))).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if step < STEPS:
            optimizer.step()
    return {
        "losses": losses,
        "weights": [weight.detach() for weight in model.parameters()],
        "gradients": [weight.grad for weight in model.parameters()],
        "buffers": dict(model.named_buffers()),
        "moments": [list(s.values()) for s in optimizer.state_dict()["state"].values()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "draws": [torch.rand(3), np.random.rand(3).tolist(), random.random()],
    }


def check_equal(make: Callable[[], Any], **options: Any) -> None:
    """Both trainings leave the same."""
    found = []
    for probed in (False, True):
        torch.manual_seed(0)
        found.append(train(make(), probed=probed, **options))
    without, with_probe = found
    assert np.isfinite(without["losses"]).all()
    assert any(gradient is not None for gradient in without["gradients"])
    for name, value in without.items():
        assert same(with_probe[name], value), name


def same(one: Any, other: Any) -> bool:
    """Whether two nests of tensors, numbers and None are equal, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and same(list(one.values()), list(other.values()))
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_a_language_model_trains_alike(name: str) -> None:
    check_equal(TEXT_MODELS[name])


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_any_torch_model_trains_alike(name: str) -> None:
    check_equal(OTHER_MODELS[name], texts=False)


@pytest.mark.parametrize("name", ["dropout", "lora", "tied"])
def test_in_a_region_of_autocast_weights_keep_their_gradients(name: str) -> None:
    check_equal(TEXT_MODELS[name], autocast=torch.bfloat16)


def test_in_a_region_of_autocast_the_weights_of_now_are_read() -> None:
    model, host = llama(), Host()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probe = LearnabilityProbe(model, host)
        probe.step()
        with torch.no_grad():
            model.lm_head.weight.zero_()
        probe.step()
    before, after = (losses for _, losses, _ in host.updates)
    np.testing.assert_allclose(after, np.log(VOCABULARY), rtol=1e-5)
    assert not np.allclose(before, after)


def test_a_compiled_model_trains_alike_and_is_compiled_no_more_often() -> None:
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled[-1] += 1
        return graph.forward

    found = []
    for probed in (False, True):
        torch.manual_seed(0)
        compiled.append(0)
        torch._dynamo.reset()
        model = classifier(nn.Linear(5, HIDDEN))
        found.append(train(model, probed=probed, texts=False, compiled=backend))
    assert compiled[0] == compiled[1] > 0
    assert found[0]["losses"] == found[1]["losses"]
    assert all(map(torch.equal, found[0]["weights"], found[1]["weights"]))
