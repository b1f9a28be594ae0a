"""A loader for the probe's tests, and what a model itself says about its samples."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from slap_stream import Advanced, SlapConfig
from slap_stream.probe.sketch import TensorSketch
from tests.helpers.tiny_models import HIDDEN, MODELS, VOCABULARY

DIM = 64


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost tiny models more than they give them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Host:
    """A loader of a fixed table: two lanes, everything handed over is kept."""

    def __init__(self, read=None, *, every=1, n=6, measurements=()):
        self.config = SlapConfig(probe_every=every, seed=5, advanced=Advanced(sketch_dim=DIM))
        self.measurements = measurements
        self.num_local_lanes = 2
        self.read = read or text_batch
        self.n = n
        self.reads, self.updates, self.refreshes, self.probe = [], [], 0, None
        self.measured = []

    def probe_budget(self):
        return self.n

    def probe_candidates(self, n):
        return np.arange(n)

    def read_batch(self, ids):
        self.reads.append(np.asarray(ids).tolist())
        return self.read(ids)

    def update(self, ids, losses, sketches, measurements):
        self.updates.append((ids, losses, sketches))
        self.measured.append(measurements)

    def refresh(self, also, then):
        self.refreshes += 1
        then(also.sum(axis=0))
        return also.sum(axis=0)

    def attach(self, probe):
        self.probe = probe


def text_batch(ids):
    """Right-padded samples of 6 to 13 tokens, the first two of each unsupervised."""
    texts = []
    for i in np.asarray(ids).tolist():
        draws = torch.Generator().manual_seed(i)
        texts.append(torch.randint(3, VOCABULARY, (6 + i,), generator=draws))
    shape = len(texts), max(map(len, texts))
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, -100),
        "sample_id": torch.as_tensor(np.asarray(ids)),
    }
    for row, text in enumerate(texts):
        batch["input_ids"][row, : len(text)] = text
        batch["attention_mask"][row, : len(text)] = 1
        batch["labels"][row, 2 : len(text)] = text[2:]
    return batch


def make(name):
    torch.manual_seed(0)
    return MODELS[name]()


def own_losses(model, size=6):
    """(size,) the model's own loss of each sample, alone in its batch."""
    model = deepcopy(model).eval()
    with torch.no_grad():
        losses = []
        for i in range(size):
            batch = text_batch([i])
            del batch["sample_id"]
            losses.append(float(model(**batch).loss))
    return np.asarray(losses)


def own_gradients(model, head, size=6):
    """(size, vocabulary, hidden) gradient of each sample's own loss in the head's weight.

    By autograd through the model's own labels path, at an extra weight of zeros beside the head's,
    so that ties, adapters and frozen weights do not matter.
    """
    extra = torch.zeros(VOCABULARY, HIDDEN, requires_grad=True)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    handle = head.register_forward_hook(lambda _, args, out: out + args[0] @ extra.T)
    gradients = []
    for i in range(size):
        batch = text_batch([i])
        del batch["sample_id"]
        gradients.append(torch.autograd.grad(model(**batch).loss, extra)[0])
    handle.remove()
    for module, mode in modes.items():
        module.training = mode
    return torch.stack(gradients)


def head_of(name, model):
    return model.transformer.output_layer if name == "chatglm" else model.get_output_embeddings()


def sketch_of(matrices, left, right):
    """(n, DIM) sketches of (n, vocabulary, hidden) matrices, scaled by the two factors."""
    sketch = TensorSketch(VOCABULARY, HIDDEN, DIM, seed=5, device=torch.device("cpu"))
    ones = torch.ones(1, VOCABULARY)
    scaled = matrices * left[:, None] * right[None]
    made = [sketch.finish(sketch(torch.eye(VOCABULARY), one, ones)) for one in scaled]
    return torch.cat(made)


def quarter_root(v):
    """The two factors of the square root of 1 / sqrt(v), v factored and damped by its mean."""
    rows, cols, mean = v.mean(1), v.mean(0), v.mean()
    return (rows / mean + 1) ** -0.25, (cols / mean + 1) ** -0.25


def trained(model, optimizer):
    """One step with each of three samples, so that the optimizer has a state."""
    for i in range(3):
        batch = text_batch([i])
        del batch["sample_id"]
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def softmax_losses(model, batch):
    return cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def vector_batch(ids):
    draws = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 5, generator=draws), torch.randint(0, 7, (8,), generator=draws)
    return {"x": x[ids], "y": y[ids]}
