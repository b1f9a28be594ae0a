"""What a model returns while a Trainer makes its training loss, and each sample's part in it.

A Trainer that is asked for the outputs may run the model again for them (TRL's does), so that they
are caught where they leave the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slap_stream.errors import ConfigError
from slap_stream.probe.fused import FusedLosses, body_outputs
from slap_stream.probe.head import check_causal, entry, hidden_of, unwrap
from slap_stream.probe.packing import mean_by_sample, sample_bounds, supervised_targets
from slap_stream.probe.readout import per_sample_loss

_CURE = (
    "override sample_losses, and give head= and loss_fn= to the probe where its losses differ, too"
)


class TrainingForward:
    """The forward of one training batch at a time, from a hook on the model.

    State: what was caught of the batch at hand, and whether a first one has been checked.
    """

    def __init__(self, head: nn.Module | None = None) -> None:
        """
        Args:
            head: As for `LearnabilityProbe`; asked for where outputs have no logits.
        """
        self._head = head
        self._model: nn.Module | None = None
        self._outputs: list[Any] = []
        self._bodies: list[Any] = []
        self._num_items: Any = None
        self._own_loss: Tensor | None = None
        self._checked = False

    @contextmanager
    def watched(self, model: nn.Module, num_items: Any) -> Iterator[None]:
        """Inside: what the model returns with gradients is caught; what it returns without is not.

        A second forward without gradients is somebody's who wants to look (TRL's, for its metrics).

        Args:
            model: The one that the loss is asked of, wrapped as it is.
            num_items: What the Trainer divides a sum over tokens by; None: it takes means.
        """

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                self._outputs.append(output)
                loss = entry(output, "loss")
                if isinstance(loss, Tensor) and not self._checked:
                    # As it is now: with several ranks the Trainer multiplies it in place.
                    self._own_loss = loss.detach().clone()

        self._model, self._num_items = model, num_items
        handle = model.register_forward_hook(leave)
        try:
            with body_outputs(model) as self._bodies:
                yield
        finally:
            handle.remove()
            # Tensors of a whole batch, which nobody needs until the next one.
            self._outputs, self._bodies = [], []
            self._model = self._own_loss = None

    @property
    def outputs(self) -> Any:
        """What the model returned; of several forwards, or none, a list."""
        return self._outputs[0] if len(self._outputs) == 1 else list(self._outputs)

    def losses(self, outputs: Any, labels: Tensor, positions: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of each sample over its supervised tokens.

        From a fused head's log-probabilities of the labels, from the logits, or from the hidden
        states, whichever of them is there. Of a first batch the latter two are compared with the
        model's own loss: kernels may write over logits, and models do things of their own.

        Args:
            outputs: What the model returned.
            labels: (batch, tokens) int64; of a batch without padding (1, tokens).
            positions: Of a batch without padding, as `packed_positions` gives them.

        Returns:
            (batch,) float32 without gradient.

        Raises:
            HeadError: If the model predicts something else than the next token.
            ConfigError: If there was not one forward, if there is nothing to make losses of, or if
                they do not make up the model's own loss.
        """
        if isinstance(outputs, list):
            raise ConfigError(
                "compute_loss must call the model that it is given once with gradients, got "
                f"{len(outputs)} calls; which of them is the samples' cannot be known: override "
                "sample_losses, which is given a list of what they returned."
            )
        if not self._checked and self._model is not None:
            check_causal(unwrap(self._model))
        with torch.no_grad():
            log_probs, mask = entry(outputs, "log_probs"), entry(outputs, "label_mask")
            if log_probs is not None and mask is not None:
                if positions is not None:
                    supervised, by_sample = supervised_targets(labels, positions)
                    return mean_by_sample(-log_probs.float()[supervised], by_sample)
                # Zero where nothing is supervised.
                means: Tensor = -log_probs.float().sum(1) / mask.sum(1).clamp(min=1)
                return means
            logits = entry(outputs, "logits")
            if logits is None:
                losses = self._from_hidden(outputs, labels, positions)
            else:
                # One sample at a time: logits as float32 are the largest thing in a training step.
                cuts = [(slice(i, i + 1), slice(None)) for i in range(len(labels))]
                if positions is not None:
                    cuts = [(slice(None), slice(*bounds)) for bounds in sample_bounds(positions)]
                losses = torch.cat([per_sample_loss(logits[cut], labels[cut]) for cut in cuts])
            if not self._checked:
                self._check(outputs, losses, labels, positions)
                self._checked = True
            return losses

    def _from_hidden(self, outputs: Any, labels: Tensor, positions: Tensor | None) -> Tensor:
        if self._model is None or len(self._bodies) != 1:
            raise ConfigError(
                "the model's output must hold logits, or the model's body must be called once in "
                f"its forward, got {type(outputs).__name__} without logits and "
                f"{len(self._bodies)} calls; switch fused losses (use_liger_kernel) or "
                f"torch_compile off, or {_CURE}."
            )
        [body] = self._bodies
        try:
            hidden = hidden_of(body)
        except (KeyError, IndexError, TypeError):
            hidden = None
        if not isinstance(hidden, Tensor):
            raise ConfigError(
                "the model's output must hold logits, or its body must return the hidden states "
                f"first or as last_hidden_state, got {type(body).__name__}; {_CURE}."
            )
        return FusedLosses(self._model, self._head).of(hidden, labels, positions)

    def _check(
        self, outputs: Any, losses: Tensor, labels: Tensor, positions: Tensor | None
    ) -> None:
        """Compare with what the model itself made of the batch."""
        # Experts' balance is part of the model's loss, and no sample's.
        if self._own_loss is None or entry(outputs, "aux_loss") is not None:
            return
        own = float(self._own_loss)
        tokens = supervised_targets(labels, positions)[1].sum(1).to(losses.device)
        total = float((losses * tokens).sum())
        means = [total / max(int(tokens.sum()), 1)]
        if self._num_items is not None:
            means.append(total / max(float(self._num_items), 1.0))
        exact = next(self._parameters()).dtype == torch.float32
        exact = exact and not torch.is_autocast_enabled(losses.device.type)
        tolerance = (1e-3 if exact else 3e-2) * max(1.0, abs(own))
        known = math.isfinite(own) and all(map(math.isfinite, means))
        if known and not any(abs(mean - own) <= tolerance for mean in means):
            raise ConfigError(
                "the samples' losses must make up the model's own loss, got a mean of "
                f"{means[-1]:.6g} against {own:.6g} on the first batch; a kernel writes over the "
                "logits (liger_kernel_config: take fused_linear_cross_entropy, not cross_entropy), "
                f"or the model does something else with them or the labels: {_CURE}."
            )

    def _parameters(self) -> Iterator[nn.Parameter]:
        assert self._model is not None, "a loss is asked for inside `watched`"
        return self._model.parameters()
