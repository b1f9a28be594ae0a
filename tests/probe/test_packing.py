"""Without padding losses, sketches and gradients are those of the padded batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slap_stream.errors import HeadError
from slap_stream.probe.packing import check_apart
from slap_stream.probe.probe import LearnabilityProbe
from slap_stream.probe.readout import per_sample_loss
from tests.helpers.probe_host import Host, make, text_batch, vector_batch
from tests.helpers.probe_host import one_thread as one_thread  # a fixture of every test here
from tests.helpers.tiny_models import Classifier

# Models that divide attention by position_ids, LoRA and tied heads included, and that do not:
# because they ignore positions, or look back without attention.
DIVIDING = [
    *("llama", "tied_llama", "glm", "gpt2", "gemma2", "cohere", "granite", "qwen2_lora"),
    *("qwen2_lora_head", "qwen2_saved_head"),
]
NOT_DIVIDING = ["chatglm", "fused_llama"]


def packed(batch):
    """The samples of a padded batch in one row, as ChatCollator lays them out."""
    real = batch["attention_mask"].bool()
    labels = batch["labels"].clone()
    labels[:, 0] = -100
    return {
        "input_ids": batch["input_ids"][real][None],
        "position_ids": (real.cumsum(1) - 1)[real][None],
        "labels": labels[real][None],
        "use_cache": False,
        "sample_id": batch["sample_id"],
    }


def packed_batch(ids):
    return packed(text_batch(ids))


@given(data=st.data())
def test_a_samples_loss_does_not_depend_on_where_it_lies(data):
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    draws = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    shape = len(lengths), max(lengths)
    real = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    # First tokens may be labelled, too: nothing predicts them.
    labels = torch.randint(0, 7, shape, generator=draws)
    labels[~real | (torch.rand(shape, generator=draws) < 0.4)] = -100
    logits = torch.randn(*shape, 7, generator=draws, requires_grad=True)
    positions = (real.cumsum(1) - 1)[real][None]
    padded = per_sample_loss(logits, labels)
    in_one_row = per_sample_loss(logits[real][None], labels[real][None], positions)
    assert in_one_row.shape == padded.shape
    torch.testing.assert_close(in_one_row, padded)
    (expected,) = torch.autograd.grad(padded.sum(), logits)
    (gradient,) = torch.autograd.grad(in_one_row.sum(), logits)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("name", "attention"),
    [*((n, "eager") for n in DIVIDING), *((n, "sdpa") for n in ("llama", "gpt2", "qwen2_lora"))],
)
def test_the_probe_reads_the_same_without_padding(name, attention):
    seen = []
    for read in (text_batch, packed_batch):
        model, host = make(name), Host(read, measurements=("nuclear_norm",))
        _attend(model, attention)
        probe = LearnabilityProbe(model, host)
        probe.step()
        assert len(host.reads[-1]) == 3
        target = probe.mean_sketch([read([3, 4, 5])])
        seen.append([*host.updates[0][1:], host.measured[0]["nuclear_norm"], target])
    for padded, in_one_row in zip(*seen, strict=True):
        np.testing.assert_allclose(in_one_row, padded, rtol=2e-4, atol=2e-5 * np.abs(padded).max())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["tied_llama", "gpt2", "qwen2_lora"])
def test_gradients_are_those_of_the_padded_batch(name, attention):
    batch, gradients = text_batch(range(4)), []
    for inputs in (batch, packed(batch)):
        model = make(name).eval()
        _attend(model, attention)
        inputs = dict(inputs)
        del inputs["sample_id"]
        losses = per_sample_loss(
            model(**inputs).logits, inputs["labels"], inputs.get("position_ids")
        )
        losses.mean().backward()
        trained = [p.grad for p in model.parameters() if p.requires_grad]
        gradients.append(torch.cat([grad.flatten() for grad in trained]))
    padded, in_one_row = gradients
    torch.testing.assert_close(in_one_row, padded, rtol=1e-4, atol=1e-5 * float(padded.abs().max()))


@pytest.mark.parametrize("name", NOT_DIVIDING)
def test_a_model_whose_samples_see_each_other_is_refused(name):
    with pytest.raises(HeadError, match=r"must not see each other.*position_ids.*without packing"):
        LearnabilityProbe(make(name), Host(packed_batch))


def test_with_a_cache_samples_see_each_other():
    def cached(ids):
        return {name: value for name, value in packed_batch(ids).items() if name != "use_cache"}

    model = make("llama")
    with pytest.raises(HeadError, match="have collate_fn add use_cache=False"):
        LearnabilityProbe(model, Host(cached))
    model.config.use_cache = False
    LearnabilityProbe(model, Host(cached))


def test_of_one_sample_there_is_nothing_to_check():
    model = make("fused_llama")
    check_apart(model, model.lm_head, packed_batch([0]))
    check_apart(model, model.lm_head, text_batch([0, 1]))


def test_what_is_not_packed_is_refused():
    logits, labels = torch.zeros(1, 4, 7), torch.zeros(1, 4, dtype=torch.int64)
    for positions in ([[1, 2, 0, 1]], [[0, 1, 2]], [0, 1, 2, 3]):
        with pytest.raises(ValueError, match=r"position_ids must be \(1, tokens\).*begin with 0"):
            per_sample_loss(logits, labels, torch.tensor(positions))
    with pytest.raises(ValueError, match="leave them out where every sample has a row"):
        per_sample_loss(
            logits.expand(2, -1, -1), labels.expand(2, -1), torch.zeros(2, 4, dtype=torch.int64)
        )


def test_loss_fn_is_refused():
    def read(ids):
        positions = torch.zeros(1, len(ids), dtype=torch.int64)
        return {**vector_batch(ids), "position_ids": positions}

    model = Classifier()
    with pytest.raises(HeadError, match="loss_fn must be left out with batches without padding"):
        LearnabilityProbe(model, Host(read), head=model.out, loss_fn=lambda model, batch: None)


def _attend(model, attention):
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.set_attn_implementation(attention)
