"""Losses and gradients of a batch at the output head, from one forward.

The gradient of a sample's loss with respect to the head's weight is sum_t d_t (x) h_t: d_t is the
gradient with respect to what left the head at token t, h_t is what entered it. Both are known
after a forward, and both go to a `GradientSink` in blocks of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slap_stream.errors import HeadError
from slap_stream.probe.head import (
    CURE,
    LogitTransform,
    accepted,
    call_inputs,
    entry,
    gradients_from_head,
    run_to_head,
)
from slap_stream.probe.measurements import functions_of
from slap_stream.probe.sink import GradientSink
from slap_stream.types import IGNORED_LABEL

LossFn = Callable[[nn.Module, Any], Tensor]

# Logits in memory at a time: 16 MiB on a CPU (measured best), and 256 tokens of the largest
# vocabularies on an accelerator, where fewer would read the head's weight too often.
_BLOCK_ELEMENTS_CPU, _BLOCK_ELEMENTS = 1 << 22, 1 << 26


def per_sample_loss(logits: Tensor | None, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each sample over its supervised tokens.

    Args:
        logits: (batch, tokens, vocabulary), of any floating dtype; position t predicts t + 1.
        labels: (batch, tokens) int64, `IGNORED_LABEL` (-100) where a token is not supervised.

    Returns:
        (batch,) float32, differentiable; exactly 0 for a sample without supervised tokens, which
        has nothing to teach.

    Raises:
        ValueError: If the shapes do not belong together, or there are no logits.
    """
    if logits is None:
        raise ValueError(
            "logits must be (batch, tokens, vocabulary), got None; the model fuses its loss and "
            "makes none: call it without labels, or with skip_logits=False for Liger's kernels."
        )
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            "logits must be (batch, tokens, vocabulary) for labels (batch, tokens), got "
            f"{tuple(logits.shape)!r} and {tuple(labels.shape)!r}; logits_to_keep must be left out."
        )
    targets = labels[:, 1:]
    supervised = targets != IGNORED_LABEL  # (batch, tokens - 1)
    # Selected before the cast: a prompt's logits are never copied to float32.
    token_losses = nn.functional.cross_entropy(
        logits[:, :-1][supervised].float(), targets[supervised], reduction="none"
    )
    return _mean_over_tokens(token_losses, supervised)


def _mean_over_tokens(token_losses: Tensor, supervised: Tensor) -> Tensor:
    """(supervised tokens,) and their (batch, tokens) mask to (batch,) means, 0 where none."""
    dense = token_losses.new_zeros(supervised.shape).masked_scatter(supervised, token_losses)
    return dense.sum(1) / supervised.sum(1).clamp(min=1)


class Reader(Protocol):
    """How one kind of model is read."""

    def check(self, batch: Any, size: int) -> tuple[int, int, torch.device]:
        """Compare with the model's own loss; learn the head's shape.

        Returns:
            Vocabulary, hidden size and device of the head.

        Raises:
            HeadError: If the model cannot be read, or is not read as it reads itself.
        """
        ...

    def read(self, batch: Any, size: int, sink: GradientSink | None) -> Tensor:
        """Read a batch; gradients go to the sink.

        Returns:
            (size, 1 + measurements) float32 losses of the batch's samples, and what else was asked
            for of their logits.
        """
        ...


class CausalReader:
    """Next-token cross-entropy at a linear head, a block of tokens at a time."""

    def __init__(
        self, model: nn.Module, head: nn.Module, *, measurements: Sequence[str] = ()
    ) -> None:
        """Read the model's logit transform from its configuration."""
        self._model = model
        self._head = head
        self._measure = functions_of(measurements)
        self._transform = LogitTransform.of(model)
        # The head of ChatGLM works on (tokens, batch, hidden).
        self._tokens_first = False

    def check(self, batch: Any, size: int) -> tuple[int, int, torch.device]:
        """As `Reader.check`."""
        inputs = call_inputs(self._model, batch)
        labels = batch.get("labels")
        if not inputs or not isinstance(labels, Tensor):
            raise HeadError(
                "batch must have labels and at least one argument of the model's forward, got "
                f"{', '.join(map(str, batch))}; {CURE}."
            )
        supervised = (labels[:, 1:] != IGNORED_LABEL).sum(1)
        if not bool(supervised.any()):
            raise HeadError(
                "check_ids must name a sample with supervised tokens, got none; choose others."
            )
        entered: list[Tensor] = []
        with torch.no_grad():
            output = run_to_head(self._model, self._head, inputs, entered.append)
            hidden = entered[0]
            shape = tuple(labels.shape)
            self._tokens_first = tuple(hidden.shape[:2]) == shape[::-1] != shape
            one = self._head.forward(hidden[:, -1:] if hidden.ndim == 3 else hidden)
            losses = self.read(batch, size, None)[:, 0]
            own = self._own_loss(inputs, labels)
        tolerance = _tolerance(one)
        ours = _over_all_tokens(losses, supervised)
        if not abs(ours - own) <= tolerance * max(1.0, abs(own)):
            raise HeadError(
                f"the probe's loss must equal the model's own, got {ours:.6g} against {own:.6g} on "
                f"one batch; the model does something else with its logits or labels: {CURE}."
            )
        made = entry(output, "logits")
        if isinstance(made, Tensor) and made.numel() == one.numel():
            # A scale on the small logits of a fresh model hardly shows in its loss.
            expected = one.float().clone()
            self._transform.apply_(expected)
            if expected.shape != made.shape:
                expected = expected.transpose(0, 1)
            gap = float((made.float() - expected).abs().max())
            if not gap <= tolerance * float(made.abs().max()):
                raise HeadError(
                    "the head's output must be the model's logits, up to a scale and soft cap "
                    f"that its configuration names, got logits that differ by {gap:.3g}; {CURE}."
                )
        return one.shape[-1], hidden.shape[-1], hidden.device

    def read(self, batch: Any, size: int, sink: GradientSink | None) -> Tensor:
        """As `Reader.read`."""
        columns: list[Tensor] = []

        def consume(entered: Tensor) -> None:
            columns.append(self._read_tokens(entered, batch["labels"], sink))

        with torch.no_grad():
            run_to_head(self._model, self._head, call_inputs(self._model, batch), consume)
        return columns[0]

    def _read_tokens(self, entered: Tensor, labels: Tensor, sink: GradientSink | None) -> Tensor:
        hidden = entered.transpose(0, 1) if self._tokens_first else entered
        if hidden.ndim == 2 and hidden.shape[0] == labels.numel():
            hidden = hidden.view(*labels.shape, -1)  # (batch, tokens, hidden)
        if hidden.ndim != 3 or hidden.shape[:2] != labels.shape:
            raise HeadError(
                "the head must be given the hidden states of every token, got "
                f"{tuple(entered.shape)!r} for labels {tuple(labels.shape)!r}; leave out "
                f"logits_to_keep and the like, or {CURE}."
            )
        labels = labels.to(hidden.device)
        supervised = labels[:, 1:] != IGNORED_LABEL
        targets = labels[:, 1:][supervised]  # (supervised tokens,)
        inputs = hidden[:, :-1][supervised]  # (supervised tokens, hidden)
        weights = _token_weights(supervised)
        token_losses = torch.zeros(len(targets), dtype=torch.float32, device=hidden.device)
        start, block = 0, 1
        while start < len(targets):
            rows = slice(start, start + block)
            logits = self._head.forward(inputs[rows])
            token_losses[rows] = self._read_block(
                logits, inputs[rows], targets[rows], weights[:, rows], sink
            )
            start += block
            # The vocabulary is known after the first token.
            block = _block_tokens(logits)
        losses = _mean_over_tokens(token_losses, supervised)
        if not self._measure:
            return losses[:, None]
        return torch.cat([losses[:, None], self._measured_of(inputs, supervised)], 1)

    def _measured_of(self, inputs: Tensor, supervised: Tensor) -> Tensor:
        """(batch, measurements) from what enters the head at the (supervised tokens,).

        A pass of its own: blocks of tokens cut samples, and a sample's logits are needed at once.
        """
        rows, start = [], 0
        for tokens in supervised.sum(1).tolist():
            logits = self._head.forward(inputs[start : start + tokens])
            start += tokens
            with torch.autocast(logits.device.type, enabled=False):
                logits = logits.float()
                self._transform.apply_(logits)
                rows.append(torch.stack([measure(logits) for measure in self._measure]))
        return torch.stack(rows)

    def _read_block(
        self,
        head_output: Tensor,
        inputs: Tensor,
        targets: Tensor,
        weights: Tensor,
        sink: GradientSink | None,
    ) -> Tensor:
        """(tokens,) losses of a block of (tokens, vocabulary) logits."""
        with torch.autocast(head_output.device.type, enabled=False):
            logits = head_output.float()
            slope = self._transform.apply_(logits)
            normaliser = logits.logsumexp(1)
            losses = normaliser - logits.gather(1, targets[:, None])[:, 0]
            if sink is None:
                return losses
            prob = logits.sub_(normaliser[:, None]).exp_()
            right = inputs.float()
            finite = torch.isfinite(losses) & torch.isfinite(right).all(1)
            if not bool(finite.all()):
                # One bad token would spoil every sample of the block: NaN * 0 is NaN.
                prob = torch.where(finite[:, None], prob, 0.0)
                right = torch.where(finite[:, None], right, 0.0)
            scale = self._transform.scale
            chain: Tensor | float = scale if slope is None else slope.mul_(scale)
            curvature = None
            if sink.wants_curvature:
                curvature = (prob - prob * prob).mul_(chain).mul_(chain)
            prob[torch.arange(len(targets), device=targets.device), targets] -= finite.float()
            sink.add(prob.mul_(chain), right, weights, curvature)
        return losses

    def _own_loss(self, inputs: Mapping[str, Any], labels: Tensor) -> float:
        """The model's own mean over the supervised tokens of the batch."""
        extra = {"labels": labels} if accepted(self._model, ["labels"]) else {}
        output = self._model(**inputs, **extra)
        loss = entry(output, "loss")
        if isinstance(loss, Tensor):
            return float(loss)
        logits = output if isinstance(output, Tensor) else entry(output, "logits")
        if not isinstance(logits, Tensor):
            raise HeadError(
                f"the model must return a loss or logits, got {type(output).__name__}; {CURE}."
            )
        labels = labels.to(logits.device)
        supervised = (labels[:, 1:] != IGNORED_LABEL).sum(1)
        return _over_all_tokens(per_sample_loss(logits, labels), supervised)


class LossFnReader:
    """Losses of the caller's making; gradients by autograd from the head's output on.

    The model makes its own logits here, of every token; measurements are of all that left the head
    for a sample, because which tokens a loss looks at is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module,
        loss_fn: LossFn,
        *,
        measurements: Sequence[str] = (),
    ) -> None:
        """Keep what is needed to read."""
        self._model = model
        self._head = head
        self._loss_fn = loss_fn
        self._measure = functions_of(measurements)
        self._batch_axis = 0

    def check(self, batch: Any, size: int) -> tuple[int, int, torch.device]:
        """As `Reader.check`; the model's own loss is what loss_fn makes without hooks."""
        losses, entered, left = self._forward(batch, size)
        with torch.no_grad():
            own = self._loss_fn(self._model, batch).float()
        if not torch.allclose(losses, own, rtol=_tolerance(left), atol=_tolerance(left)):
            raise HeadError(
                "loss_fn must return the same losses again in evaluation mode, got "
                f"{losses.tolist()} and {own.tolist()}; it must not draw or count."
            )
        # The gradient of the first loss tells along which axis of the head's output samples lie,
        # and that losses are of one sample each.
        (gradient,) = torch.autograd.grad(losses[0], left)
        touched = gradient != 0
        for axis in range(min(2, left.ndim - 1)):
            if left.shape[axis] == size and not bool(touched.narrow(axis, 1, size - 1).any()):
                self._batch_axis = axis
                return left.shape[-1], entered.shape[-1], left.device
        raise HeadError(
            "each loss of loss_fn must depend on its own sample alone, got a first loss that "
            f"others enter, at a head's output of shape {tuple(left.shape)!r}; average nothing "
            "over the batch."
        )

    def read(self, batch: Any, size: int, sink: GradientSink | None) -> Tensor:
        """As `Reader.read`."""
        losses, entered, left = self._forward(batch, size)
        columns = losses.detach()[:, None]
        outputs = left.detach().movedim(self._batch_axis, 0).reshape(size, -1, left.shape[-1])
        for measure in self._measure:
            measured = torch.stack([measure(output.float()) for output in outputs])
            columns = torch.cat([columns, measured[:, None]], 1)
        if sink is None:
            return columns
        # The sum: each loss touches its own rows only.
        (gradient,) = torch.autograd.grad(losses.sum(), left)
        # (samples * tokens, width)
        gradient = gradient.movedim(self._batch_axis, 0).reshape(-1, gradient.shape[-1])
        inputs = entered.detach().movedim(self._batch_axis, 0).reshape(-1, entered.shape[-1])
        samples = torch.arange(size, device=left.device)
        owner = samples.repeat_interleave(len(inputs) // size)
        block = _block_tokens(gradient)
        with torch.autocast(left.device.type, enabled=False):
            for start in range(0, len(inputs), block):
                rows = slice(start, start + block)
                d, h = gradient[rows].float(), inputs[rows].float()
                finite = torch.isfinite(d).all(1, keepdim=True)
                finite &= torch.isfinite(h).all(1, keepdim=True)
                d, h = torch.where(finite, d, 0.0), torch.where(finite, h, 0.0)
                # Of a loss that is not known, the squared gradient stands in for the curvature.
                curvature = d.square() if sink.wants_curvature else None
                sink.add(d, h, (owner[rows] == samples[:, None]).float(), curvature)
        return columns

    def _forward(self, batch: Any, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """(size,) losses with a graph from the head's output on, what entered and left the head."""
        with gradients_from_head(self._head) as calls:
            losses = self._loss_fn(self._model, batch)
        if not isinstance(losses, Tensor) or losses.shape != (size,):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise HeadError(f"loss_fn must return ({size},) losses, one a sample, got {got!r}.")
        if len(calls) != 1 or not losses.requires_grad:
            raise HeadError(
                "loss_fn must call the model once, and its losses must follow from the head's "
                f"output, got {len(calls)} calls of {type(self._head).__name__}; pass head= (the "
                "module whose output the losses are made of)."
            )
        entered, left = calls[0]
        return losses.float(), entered, left


def _over_all_tokens(losses: Tensor, supervised: Tensor) -> float:
    """Mean over the batch's tokens of (batch,) means over each sample's (batch,) tokens."""
    tokens = supervised.to(losses.device)
    # A sample without tokens has no part in it, whatever its loss.
    return float(torch.where(tokens > 0, losses * tokens, 0.0).sum() / tokens.sum())


def _token_weights(supervised: Tensor) -> Tensor:
    """(batch, tokens) mask to (batch, supervised tokens) weights of each sample's mean."""
    samples = torch.arange(len(supervised), device=supervised.device)[:, None]
    owner = samples.expand_as(supervised)[supervised]
    return (owner == samples) / supervised.sum(1, keepdim=True).clamp(min=1)


def _block_tokens(logits: Tensor) -> int:
    elements = _BLOCK_ELEMENTS_CPU if logits.device.type == "cpu" else _BLOCK_ELEMENTS
    return max(1, elements // logits.shape[-1])


def _tolerance(logits: Tensor) -> float:
    """How far two ways of computing the same loss may differ in this precision, relatively."""
    return 1e-3 if logits.dtype in (torch.float32, torch.float64) else 3e-2
