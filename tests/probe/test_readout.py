"""Losses as the model's own, sketches as of brute-force gradients, in bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from slap_stream.errors import ConfigError
from slap_stream.probe.probe import LearnabilityProbe
from slap_stream.probe.readout import per_sample_loss
from slap_stream.probe.sketch import TensorSketch
from tests.helpers.probe_host import (
    DIM,
    Host,
    head_of,
    make,
    own_gradients,
    own_losses,
    sketch_of,
    softmax_losses,
    text_batch,
    trained,
    vector_batch,
)
from tests.helpers.probe_host import one_thread as one_thread  # a fixture of every test here
from tests.helpers.tiny_models import HIDDEN, MODELS, VOCABULARY, Classifier, llama


@pytest.mark.parametrize("name", [*MODELS])
def test_losses_are_the_models_own(name):
    model, host = make(name), Host()
    LearnabilityProbe(model, host).step()
    ids, losses, sketches = host.updates[0]
    assert ids.tolist() == [*range(6)]
    assert losses.dtype == np.float64
    assert sketches.shape == (6, DIM)
    assert sketches.dtype == np.float32
    np.testing.assert_allclose(losses, own_losses(model), rtol=2e-5)


# A fused loss has no place for the extra weight; it is the Llama below it, tested by name.
@pytest.mark.parametrize("name", [n for n in MODELS if n != "fused_llama"])
def test_sketches_are_those_of_brute_force_gradients(name):
    model, host = make(name), Host()
    head = head_of(name, model)
    probe = LearnabilityProbe(model, host)
    left, right = probe._moment.factors()
    assert float(left.min()) < 0.95  # preconditioned from the first step on
    probe.step()
    expected = sketch_of(own_gradients(model, head), left, right)
    error = (torch.as_tensor(host.updates[0][2]) - expected).abs().max()
    assert float(error) < 2e-5 * float(expected.abs().max())


def test_a_head_that_is_never_called_is_read_from_the_body():
    sketches = []
    for name in ("llama", "fused_llama"):
        host = Host()
        LearnabilityProbe(make(name), host).step()
        sketches.append(host.updates[0][2])
    np.testing.assert_allclose(sketches[0], sketches[1], rtol=1e-4, atol=1e-5)


def test_inner_products_estimate_preconditioned_ones():
    """At 4096 numbers an error is 1/64 of the norms; largest of 15 pairs, stated: 5/64."""
    model, host = make("gpt2"), Host()
    object.__setattr__(host.config.advanced, "sketch_dim", 4096)
    probe = LearnabilityProbe(model, host)
    left, right = probe._moment.factors()
    probe.step()
    gradients = own_gradients(model, model.lm_head)
    preconditioner = (left[:, None] * right[None]) ** 2
    exact = torch.einsum("ivj,vj,kvj->ik", gradients, preconditioner, gradients)
    made = torch.as_tensor(host.updates[0][2] @ host.updates[0][2].T)
    norms = exact.diagonal().sqrt()
    assert float(((made - exact) / (norms[:, None] * norms[None])).abs().max()) < 5 / 64


def test_any_torch_model_works_with_head_and_loss_fn():
    torch.manual_seed(0)
    model, host = Classifier(), Host(vector_batch)
    probe = LearnabilityProbe(model, host, head=model.out, loss_fn=softmax_losses)
    left, right = probe._moment.factors()
    probe.step()
    _, losses, sketches = host.updates[0]
    model.eval()
    expected = softmax_losses(model, vector_batch(np.arange(6)))
    np.testing.assert_allclose(losses, expected.detach(), rtol=1e-6)
    gradients = [torch.autograd.grad(e, model.out.weight, retain_graph=True)[0] for e in expected]
    sketch = TensorSketch(7, HIDDEN, DIM, seed=5, device=torch.device("cpu"))
    for made, gradient in zip(sketches, gradients, strict=True):
        scaled = gradient * left[:, None] * right[None]
        twin = sketch.finish(sketch(torch.eye(7), scaled, torch.ones(1, 7)))[0]
        np.testing.assert_allclose(made, twin, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "chatglm"])
def test_loss_fn_gives_what_the_built_in_loss_gives(name):
    """The same gradients by autograd from the head's output on; the preconditioner is Adam's."""

    def loss_fn(model, batch):
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return per_sample_loss(output.logits, batch["labels"])

    model = make(name)
    optimizer = trained(model, torch.optim.AdamW(model.parameters()))
    made = []
    for chosen in (None, loss_fn):
        host = Host()
        LearnabilityProbe(model, host, loss_fn=chosen, optimizer=optimizer).step()
        made.append(host.updates[0])
    np.testing.assert_allclose(made[0][1], made[1][1], rtol=1e-5)
    np.testing.assert_allclose(made[0][2], made[1][2], rtol=1e-3, atol=2e-5)


def test_a_loss_that_is_not_finite_touches_no_other_sample():
    model, hosts = make("llama"), (Host(), Host())
    probe = LearnabilityProbe(model, hosts[0])
    probe.step()
    probe = LearnabilityProbe(model, hosts[1])
    batch = text_batch([4])["input_ids"][0]
    others = text_batch([0, 1, 2, 3, 5])["input_ids"]
    alone = next(t for t in batch[4:].tolist() if t not in others)
    with torch.no_grad():
        model.get_input_embeddings().weight[alone] = float("nan")
    probe.step()
    (_, clean, clean_sketches), (_, dirty, sketches) = hosts[0].updates[0], hosts[1].updates[0]
    rest = [0, 1, 2, 3, 5]
    assert np.isnan(dirty[4])
    np.testing.assert_allclose(dirty[rest], clean[rest], rtol=1e-6)
    np.testing.assert_allclose(sketches[rest], clean_sketches[rest], rtol=1e-4, atol=1e-5)
    assert np.isfinite(sketches).all()
    assert np.isfinite(probe.state_dict()["second_moment"]["rows"]).all()
    assert probe.metrics()["probe_nonfinite"] == 1
    assert np.isfinite(probe.metrics()["probe_loss"])


def test_without_sketches_only_losses_are_handed_over():
    host = Host()
    LearnabilityProbe(make("llama"), host, sketches=False).step()
    assert host.updates[0][2] is None


@pytest.mark.parametrize("name", ["llama", "gemma2", "chatglm", "qwen2_lora"])
def test_nuclear_norms_are_those_of_the_models_own_supervised_logits(name):
    model, host = make(name), Host(measurements=["nuclear_norm"])
    LearnabilityProbe(model, host).step()
    model.eval()
    expected = []
    for i in range(6):
        batch = text_batch([i])
        with torch.no_grad():
            inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
            logits = model(**inputs).logits[0, :-1][batch["labels"][0, 1:] != -100]
        expected.append(np.linalg.svd(logits.numpy(), compute_uv=False).sum())
    np.testing.assert_allclose(host.measured[0]["nuclear_norm"], expected, rtol=2e-4)
    np.testing.assert_allclose(host.updates[0][1], own_losses(model), rtol=2e-5)


def test_nuclear_norms_of_any_model_are_of_what_leaves_its_head():
    torch.manual_seed(0)
    model, host = Classifier(), Host(vector_batch, measurements=["nuclear_norm"])
    LearnabilityProbe(model, host, head=model.out, loss_fn=softmax_losses).step()
    with torch.no_grad():
        left = model.eval().out(model.body(vector_batch(np.arange(6))["x"]))
    # One row a sample: its only singular value is its length.
    np.testing.assert_allclose(host.measured[0]["nuclear_norm"], left.norm(dim=1), rtol=1e-4)


def test_nuclear_norms_are_made_on_demand_and_of_what_is_there():
    def nothing_in_row_3(ids):
        batch = text_batch(ids)
        batch["labels"][batch["sample_id"] == 3] = -100
        return batch

    model = make("llama")
    plain, host = Host(), Host(nothing_in_row_3, measurements=["nuclear_norm"])
    LearnabilityProbe(model, plain).step()
    assert plain.measured == [{}]
    probe = LearnabilityProbe(model, host)
    with torch.no_grad():
        model.get_input_embeddings().weight[text_batch([4])["input_ids"][0, 4:]] = float("nan")
    probe.step()
    norms = host.measured[0]["nuclear_norm"]
    assert norms[3] == 0
    assert np.isnan(norms[4])


def test_a_measurement_that_nobody_can_make_is_refused_by_name():
    host = Host(measurements=["nuclear_norm", "perplexity"])
    with pytest.raises(ConfigError, match="must be of nuclear_norm, got perplexity; without the"):
        LearnabilityProbe(make("llama"), host)


def test_a_sample_without_supervised_tokens_has_loss_and_sketch_zero():
    def nothing_in_row_3(ids):
        batch = text_batch(ids)
        batch["labels"][batch["sample_id"] == 3] = -100
        return batch

    host = Host(nothing_in_row_3)
    LearnabilityProbe(make("llama"), host).step()
    _, losses, sketches = host.updates[0]
    assert losses[3] == 0
    assert not sketches[3].any()
    assert (losses[[0, 1, 2, 4, 5]] > 0).all()


def test_logits_to_keep_in_a_batch_hides_no_tokens():
    host = Host(lambda ids: {**text_batch(ids), "logits_to_keep": 1, "num_items_in_batch": 3})
    model = make("llama")
    LearnabilityProbe(model, host).step()
    np.testing.assert_allclose(host.updates[0][1], own_losses(model), rtol=2e-5)


def test_bfloat16_models_are_read_in_their_own_precision():
    model, host = make("llama").to(torch.bfloat16), Host()
    LearnabilityProbe(model, host).step()
    np.testing.assert_allclose(host.updates[0][1], own_losses(model), rtol=3e-2)
    assert host.updates[0][2].dtype == np.float32


def test_autocast_around_a_step_is_honoured():
    model, host = make("llama"), Host()
    probe = LearnabilityProbe(model, host)
    probe.step()
    with torch.autocast("cpu", torch.bfloat16):
        probe.step()
    (_, full, full_sketches), (_, half, sketches) = host.updates
    assert not np.array_equal(full, half)
    np.testing.assert_allclose(half, full, rtol=3e-2)
    cosines = (full_sketches * sketches).sum(1) / (
        np.linalg.norm(full_sketches, axis=1) * np.linalg.norm(sketches, axis=1)
    )
    assert cosines.min() > 0.98


def test_blocks_of_tokens_change_nothing(monkeypatch):
    made = []
    for elements in (1 << 20, 3 * VOCABULARY):
        monkeypatch.setattr("slap_stream.probe.readout._BLOCK_ELEMENTS_CPU", elements)
        host = Host()
        LearnabilityProbe(make("gemma2"), host).step()
        made.append(host.updates[0])
    np.testing.assert_allclose(made[0][1], made[1][1], rtol=1e-6)
    np.testing.assert_allclose(made[0][2], made[1][2], rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return out


def test_memory_stays_under_the_block(monkeypatch):
    """Neither tokens x vocabulary nor vocabulary x hidden x anything is ever made."""
    vocabulary = 5_000
    torch.manual_seed(0)
    model = llama(vocab_size=vocabulary)
    monkeypatch.setattr("slap_stream.probe.readout._BLOCK_ELEMENTS_CPU", 4 * vocabulary)
    host = Host()
    probe = LearnabilityProbe(model, host)
    with Largest() as largest:
        probe.step()
    tokens = 3 * 11  # a lane's padded batch, without what cannot be supervised
    assert largest.elements == vocabulary * HIDDEN  # the head's weight, transposed: a view
    assert largest.elements < tokens * vocabulary
    np.testing.assert_allclose(host.updates[0][1], own_losses(model), rtol=2e-5)


def test_per_sample_loss_is_the_mean_over_supervised_tokens():
    logits = torch.randn(3, 5, 11, requires_grad=True)
    labels = torch.randint(0, 11, (3, 5))
    labels[0, :3] = -100
    labels[2] = -100
    made = per_sample_loss(logits, labels)
    for row in (0, 1):
        expected = cross_entropy(logits[row, :-1], labels[row, 1:])
        assert torch.allclose(made[row], expected)
    assert made[2] == 0
    made.mean().backward()
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[2].any()
    assert per_sample_loss(logits.bfloat16(), labels).dtype == torch.float32
    with pytest.raises(ValueError, match=r"logits must be \(batch, tokens, vocabulary\)"):
        per_sample_loss(logits[:, -1:], labels)
    with pytest.raises(ValueError, match="got None; the model fuses its loss and makes none: call"):
        per_sample_loss(None, labels)
