"""The probe: due when it should be, resumable, no traces left, clear about what it cannot read."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from slap_stream.errors import HeadError, StateError
from slap_stream.probe.probe import LearnabilityProbe
from tests.helpers.probe_host import (
    Host,
    make,
    own_losses,
    softmax_losses,
    text_batch,
    vector_batch,
)
from tests.helpers.probe_host import one_thread as one_thread  # a fixture of every test here
from tests.helpers.tiny_models import Classifier, gpt2, llama


def test_model_is_left_as_it_was_found():
    model, host = make("qwen2_lora"), Host()
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    batch = text_batch([0])
    del batch["sample_id"]
    model(**batch).loss.backward()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]

    def careless(ids):
        torch.rand(1), np.random.rand(), random.random()
        return text_batch(ids)

    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    host.read = careless
    probe = LearnabilityProbe(model, host)
    probe.step()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    assert [module.training for module in model.modules()] == modes
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    for parameter, grad, weight in zip(model.parameters(), grads, weights, strict=True):
        assert torch.equal(parameter, weight)
        assert parameter.grad is grad or torch.equal(parameter.grad, grad)
    assert torch.is_grad_enabled()


def test_model_is_left_as_it_was_found_when_reading_fails():
    model, host = make("llama"), Host()
    probe = LearnabilityProbe(model, host)
    model.train()

    def broken(ids):
        raise OSError("gone")

    host.read = broken
    with pytest.raises(OSError, match="gone"):
        probe.step()
    assert model.training
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_probes_when_due_and_refreshes_also_when_nothing_is_probed():
    host = Host(every=3)
    probe = LearnabilityProbe(make("llama"), host)
    host.reads.clear()
    assert [probe.step() for _ in range(6)] == [False, False, True] * 2
    assert (len(host.updates), host.refreshes) == (2, 2)
    host.n = 0
    assert [probe.step() for _ in range(3)] == [False, False, True]
    assert (len(host.updates), host.refreshes) == (2, 3)
    assert probe.metrics()["probe_samples"] == 12


def test_lanes_never_share_a_forward_and_large_ones_take_several():
    host = Host()
    probe = LearnabilityProbe(make("llama"), host, batch_size=2)
    host.reads.clear()
    probe.step()
    assert host.reads == [[0, 1], [2], [3, 4], [5]]


def test_state_resumes_exactly_also_through_json():
    torch.manual_seed(0)
    model = llama()
    hosts = Host(every=2), Host(every=2)
    probe = LearnabilityProbe(model, hosts[0])
    for _ in range(3):
        probe.step()
    state = probe.state_dict()
    plain = {k: v.tolist() for k, v in state["second_moment"].items() if hasattr(v, "tolist")}
    state = json.loads(json.dumps({**state, "second_moment": {**state["second_moment"], **plain}}))
    resumed = LearnabilityProbe(model, hosts[1], check_ids=[5])
    resumed.load_state_dict(state)
    for _ in range(3):
        assert probe.step() == resumed.step()
    for (_, losses, sketches), again in zip(hosts[0].updates[1:], hosts[1].updates, strict=True):
        assert np.array_equal(losses, again[1])
        assert np.array_equal(sketches, again[2])
    assert resumed.metrics()["probe_samples"] == probe.metrics()["probe_samples"] == 18


def test_a_state_of_another_version_or_head_is_refused():
    probe = LearnabilityProbe(make("llama"), Host())
    state = probe.state_dict()
    with pytest.raises(StateError, match="version must be 1, got 9"):
        probe.load_state_dict({**state, "version": 9})
    other = {**state["second_moment"], "rows": np.zeros(3, np.float32)}
    with pytest.raises(StateError, match=r"of a head of shape \(61, 16\)"):
        probe.load_state_dict({**state, "step": 7, "second_moment": other})
    assert probe.metrics()["probe_steps"] == 0


def test_mean_sketch_is_that_of_the_candidates_and_leaves_the_second_moment():
    host = Host()
    probe = LearnabilityProbe(make("llama"), host)
    before = probe.state_dict()["second_moment"]
    mean = probe.mean_sketch([text_batch([0, 1, 2]), text_batch([3, 4, 5])])
    for name, value in probe.state_dict()["second_moment"].items():
        np.testing.assert_array_equal(value, before[name])
    probe.step()
    np.testing.assert_allclose(mean, host.updates[0][2].mean(axis=0), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="at least one batch, got none"):
        probe.mean_sketch([])
    with pytest.raises(ValueError, match="sketches=False"):
        LearnabilityProbe(make("llama"), Host(), sketches=False).mean_sketch([text_batch([0])])


def test_wrapped_models_are_looked_through():
    model = make("llama")
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for wrapped in (parallel, nn.DataParallel(model), torch.compile(parallel)):
            host = Host()
            LearnabilityProbe(wrapped, host).step()
            np.testing.assert_allclose(host.updates[0][1], own_losses(model), rtol=2e-5)
    finally:
        torch.distributed.destroy_process_group()


class Scaled(nn.Module):
    """Logits are scaled where no configuration says so."""

    def __init__(self, factor):
        super().__init__()
        self.inner = gpt2()
        self.factor = factor

    def get_output_embeddings(self):
        return self.inner.lm_head

    def forward(self, input_ids, attention_mask):
        output = self.inner(input_ids=input_ids, attention_mask=attention_mask)
        output.logits = output.logits * self.factor
        return output


def test_unknown_logit_transforms_raise_and_name_the_cure():
    with pytest.raises(HeadError, match=r"must equal the model's own.*head=.*loss_fn="):
        LearnabilityProbe(Scaled(0.3), Host())
    # On the small logits of a fresh model the loss alone would not tell.
    small = Scaled(1.02)
    with torch.no_grad():
        small.inner.lm_head.weight.mul_(0.01)
    with pytest.raises(HeadError, match=r"head's output must be the model's logits.*loss_fn="):
        LearnabilityProbe(small, Host())


def test_models_that_cannot_be_read_raise_and_name_the_cure():
    with pytest.raises(HeadError, match=r"Classifier has no output head.*head="):
        LearnabilityProbe(Classifier(), Host())
    with pytest.raises(HeadError, match="head must be a submodule of the model, got Linear"):
        LearnabilityProbe(make("llama"), Host(), head=nn.Linear(2, 2))
    model = Classifier()
    with pytest.raises(HeadError, match=r"batch must have labels.*got x, y.*loss_fn="):
        LearnabilityProbe(model, Host(vector_batch), head=model.out)
    with pytest.raises(HeadError, match=r"batch must be a mapping.*got list"):
        LearnabilityProbe(make("llama"), Host(lambda ids: [1]))
    keeps = KeepsLast(make("llama").config)
    with pytest.raises(HeadError, match=r"hidden states of every token.*logits_to_keep"):
        LearnabilityProbe(keeps, Host())


class KeepsLast(LlamaForCausalLM):
    """Its head is never shown more than the last token."""

    def forward(self, **inputs):
        return super().forward(**inputs, logits_to_keep=1)


def centred_losses(model, batch):
    losses = softmax_losses(model, batch)
    return losses - losses.mean()


def test_losses_of_loss_fn_must_be_per_sample_and_follow_from_the_head():
    torch.manual_seed(0)
    model = Classifier()

    def build(loss_fn, head=model.out):
        LearnabilityProbe(model, Host(vector_batch), head=head, loss_fn=loss_fn)

    with pytest.raises(HeadError, match=r"loss_fn must return \(2,\) losses.*got \(\)"):
        build(lambda m, b: softmax_losses(m, b).mean())
    with pytest.raises(HeadError, match=r"depend on its own sample alone"):
        build(centred_losses)
    with pytest.raises(HeadError, match=r"got 0 calls of Linear; pass head="):
        build(lambda m, b: b["x"].sum(1))
    with pytest.raises(HeadError, match=r"same losses again"):
        build(lambda m, b: softmax_losses(m, b) + torch.rand(2))


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        LearnabilityProbe(make("llama"), Host(), batch_size=0)
    with pytest.raises(ValueError, match="check_ids must name at least one sample"):
        LearnabilityProbe(make("llama"), Host(), check_ids=[])
