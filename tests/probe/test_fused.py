"""Losses from what left a model's body, where its output has no logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from slap_stream.errors import HeadError
from slap_stream.probe.fused import FusedLosses, body_outputs
from slap_stream.probe.head import hidden_of
from slap_stream.probe.probe import LearnabilityProbe
from tests.helpers.probe_host import Host, make, own_losses, text_batch
from tests.helpers.probe_host import one_thread as one_thread  # a fixture of every test here
from tests.helpers.tiny_models import _SHAPE, MODELS, FusedLlama, spread


def batch_of(size=6):
    batch = text_batch(range(size))
    del batch["sample_id"]
    return batch


# ChatGLM's layout has no body that can be told from the model.
@pytest.mark.parametrize("name", [n for n in MODELS if n != "chatglm"])
def test_losses_of_a_bodys_output_are_the_models_own(name):
    model, batch = make(name).eval(), batch_of()
    with body_outputs(model) as caught:
        model(**batch)
        with torch.no_grad():
            model(**batch)
    assert len(caught) == 1
    losses = FusedLosses(model).of(hidden_of(caught[0]), batch["labels"])
    assert not losses.requires_grad
    np.testing.assert_allclose(losses, own_losses(model), rtol=2e-5)
    with body_outputs(model) as other:
        pass
    model(**batch)
    assert len(caught) + len(other) == 1


def test_no_body_and_a_compiled_model_show_nothing():
    model = make("chatglm")
    with body_outputs(model) as caught:
        model(**batch_of(2))
    assert caught == []
    model = make("llama")
    with body_outputs(torch.compile(model)):
        assert not model.model._forward_hooks


def test_states_of_other_tokens_are_refused():
    model, batch = make("llama"), batch_of()
    with pytest.raises(HeadError, match="must be given the hidden states of every token"):
        FusedLosses(model).of(torch.zeros(6, 3, 16), batch["labels"])


def test_a_weight_that_is_elsewhere_is_refused():
    model, batch = make("llama"), batch_of()
    model.lm_head.weight.data = torch.empty(0)  # as DeepSpeed leaves it
    with pytest.raises(HeadError, match=r"must be whole .* got a sharded one; switch fused"):
        FusedLosses(model).of(torch.zeros(*batch["labels"].shape, 16), batch["labels"])


class FusedInADict(FusedLlama):
    """A fused loss in a plain dict."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        return {"loss": super().forward(input_ids, attention_mask, labels).loss}


def test_the_probe_reads_a_model_that_returns_a_loss_alone():
    host, model = Host(), make("fused_llama")
    expected = own_losses(model)
    model.__class__ = FusedInADict
    LearnabilityProbe(model, host).step()
    np.testing.assert_allclose(host.updates[0][1], expected, rtol=2e-5)


def test_the_balance_of_experts_is_left_out_of_the_probes_losses():
    torch.manual_seed(0)
    shape = {**_SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = spread(MixtralForCausalLM(MixtralConfig(**shape, router_aux_loss_coef=0.5)))
    expected, host = own_losses(model), Host()
    model.config.output_router_logits = True
    assert own_losses(model)[0] > expected[0] + 0.1
    LearnabilityProbe(model, host).step()
    np.testing.assert_allclose(host.updates[0][1], expected, rtol=2e-5)
