"""The second moment: the optimizer's where it has one, else Gauss-Newton, and it says which."""

from __future__ import annotations

import logging

import pytest
import torch

from slap_stream.probe.probe import LearnabilityProbe
from tests.helpers.probe_host import (
    Host,
    make,
    own_gradients,
    quarter_root,
    sketch_of,
    text_batch,
    trained,
)
from tests.helpers.probe_host import one_thread as one_thread  # a fixture of every test here
from tests.helpers.tiny_models import gemma2, llama


def gauss_newton(model, size=2):
    """(vocabulary, hidden) diagonal of the Gauss-Newton matrix over the check batch, per token."""
    entered = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, args, out: entered.append((args[0], out)))
    batch = text_batch(range(size))
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    handle.remove()
    (hidden, raw) = entered[0]
    cap = getattr(model.config, "final_logit_softcapping", None)
    slope = torch.ones_like(raw) if cap is None else 1 - torch.tanh(raw / cap) ** 2
    p = logits.softmax(-1)
    diagonal = torch.einsum("btv,btj->btvj", p * (1 - p) * slope**2, hidden**2)
    return diagonal[:, :-1][batch["labels"][:, 1:] != -100].mean(0)


@pytest.mark.parametrize("make_model", [llama, gemma2])
def test_second_moment_without_optimizer_is_gauss_newton(make_model):
    torch.manual_seed(0)
    model = make_model()
    probe = LearnabilityProbe(model, Host())
    for made, expected in zip(
        probe._moment.factors(), quarter_root(gauss_newton(model)), strict=True
    ):
        assert torch.allclose(made, expected, rtol=1e-4)
    assert probe.metrics()["probe_moment_from_optimizer"] == 0
    assert probe.metrics()["probe_moment_fallback"] == 0  # nothing was asked of an optimizer


@pytest.mark.parametrize("name", ["llama", "tied_llama", "gpt2", "qwen2_saved_head"])
def test_second_moment_comes_from_adam(name, caplog):
    model, host = make(name), Host()
    optimizer = trained(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    with caplog.at_level(logging.INFO, "slap_stream"):
        probe = LearnabilityProbe(model, host, optimizer=optimizer)
        probe.step()
    assert "taken from the optimizer" in caplog.text
    assert probe.metrics()["probe_moment_from_optimizer"] == 1
    head = model.get_output_embeddings()
    weight = head.modules_to_save["default"].weight if "saved" in name else head.weight
    left, right = quarter_root(optimizer.state[weight]["exp_avg_sq"])
    expected = sketch_of(own_gradients(model, head), left, right)
    error = (torch.as_tensor(host.updates[0][2]) - expected).abs().max()
    assert float(error) < 2e-5 * float(expected.abs().max())


def test_second_moment_comes_from_adafactor():
    model = make("llama")
    optimizer = trained(model, torch.optim.Adafactor(model.parameters()))
    probe = LearnabilityProbe(model, Host(), optimizer=optimizer)
    state = optimizer.state[model.lm_head.weight]
    v = state["row_var"] * state["col_var"] / state["row_var"].mean()
    for made, expected in zip(probe._moment.factors(), quarter_root(v), strict=True):
        assert torch.allclose(made, expected, rtol=1e-4)


def no_state(model):
    return torch.optim.AdamW(model.parameters())


def stepped(model):
    return trained(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))


def no_second_moment(model):
    return trained(model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9))


def test_before_the_first_step_the_estimate_is_no_surprise(caplog):
    model = make("llama")
    with caplog.at_level(logging.INFO, "slap_stream"):
        probe = LearnabilityProbe(model, Host(), optimizer=no_state(model))
    ours = [record for record in caplog.records if record.name.startswith("slap_stream")]
    assert [record.levelno for record in ours] == [logging.INFO]
    assert "has no state yet" in ours[0].getMessage()
    assert probe.metrics()["probe_moment_fallback"] == 1


@pytest.mark.parametrize(
    ("name", "make_optimizer", "why"),
    [
        ("qwen2_lora", stepped, "is not trained"),
        ("qwen2_lora_head", stepped, "is not trained"),
        ("llama", no_second_moment, "no second moment of the head that we know (momentum_buffer"),
    ],
)
def test_an_optimizer_that_cannot_tell_is_logged_and_shown(name, make_optimizer, why, caplog):
    model = make(name)
    with caplog.at_level(logging.WARNING, "slap_stream"):
        probe = LearnabilityProbe(model, Host(), optimizer=make_optimizer(model))
        probe.step()
        probe.step()
    ours = [record for record in caplog.records if record.name.startswith("slap_stream")]
    assert len(ours) == 1  # once, not at every step
    assert why in ours[0].getMessage()
    assert probe.metrics()["probe_moment_fallback"] == 1
