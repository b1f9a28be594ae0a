"""A model's output head: where it is, what enters and leaves it, and quiet calls of the model.

A hook on the head catches what enters it while the root module runs, so that the head's weights
are at hand (also where they are gathered for the call only), and hands it a single token to work
on: the model's own logits of all tokens are never made.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from slap_stream.errors import HeadError

# Attributes that hold the head in models which do not say so through get_output_embeddings().
_HEAD_NAMES = ("lm_head", "output_layer", "embed_out", "transformer.output_layer")
# Numbers of a buffer that is copied before a probe.
_MAX_COPIED = 1 << 20
# Ours, or the labels, or what would hide tokens from the head.
_NOT_INPUTS = frozenset(
    {"labels", "sample_id", "logits_to_keep", "num_logits_to_keep", "num_items_in_batch"}
)
CURE = (
    "pass head= (the module that makes the logits) and, unless the model takes input_ids and makes "
    "logits as a causal language model does, loss_fn=(model, batch) -> (batch,) losses"
)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DDP, DataParallel and torch.compile wrappers; FSDP stays, it gathers."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if isinstance(model, parallel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule) and not isinstance(model, FSDPModule):
            model = model._orig_mod
        else:
            return model


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile wraps the model, or what DDP or DataParallel wrap."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(model, parallel):
        model = model.module
    return isinstance(model, torch._dynamo.OptimizedModule)


def find_head(model: nn.Module, head: nn.Module | None) -> nn.Module:
    """The module that turns hidden states into logits.

    Raises:
        HeadError: If `head` is no part of the model, or none was given and none is found.
    """
    if head is not None:
        if not any(module is head for module in model.modules()):
            raise HeadError(
                f"head must be a submodule of the model, got {type(head).__name__}; hooks on "
                "another module would never be called."
            )
        return head
    ask = getattr(model, "get_output_embeddings", None)
    found = ask() if callable(ask) else None
    if isinstance(found, nn.Module):
        return found
    for name in _HEAD_NAMES:
        owner: Any = model
        for part in name.split("."):
            owner = getattr(owner, part, None)
        if isinstance(owner, nn.Module):
            return owner
    raise HeadError(f"{type(model).__name__} has no output head that can be found; {CURE}.")


def head_weight(head: nn.Module) -> nn.Parameter | None:
    """The (vocabulary, hidden) parameter of the head, also inside adapters; None if it has none."""
    active = getattr(head, "active_adapter", None)
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict) and isinstance(active, str) and active in copies:
        head = copies[active]  # a peft head that is trained in full, as a copy
    weight = getattr(head, "weight", None)  # a peft LoRA layer answers with its base layer's
    return weight if isinstance(weight, nn.Parameter) else None


def reshard(model: nn.Module) -> None:
    """Give back what FSDP2 has gathered for a forward.

    Some of it waits for a backward otherwise, the head's weights among it, in memory and in the
    place of those that the optimizer knows. Which modules wait is up to who wrapped them.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def find_body(model: nn.Module) -> nn.Module | None:
    """The module whose output enters the head, for models that never call their head."""
    inner = getattr(model, "get_base_model", None)
    base = getattr(inner() if callable(inner) else model, "base_model", None)
    return base if isinstance(base, nn.Module) and base is not model else None


def hidden_of(body_output: Any) -> Tensor:
    """The hidden states in what a body returned: of the last layer, ahead of whatever else."""
    found = getattr(body_output, "last_hidden_state", body_output)
    return found if isinstance(found, Tensor) else found[0]


def entry(output: Any, name: str) -> Any:
    """What a model's output holds under a name, as a mapping or as an attribute; None: nothing."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _text_config(model: nn.Module) -> Any:
    """A model's configuration, of its language model where it has others too; None without."""
    config = getattr(model, "config", None)
    text_config = getattr(config, "get_text_config", None)
    return text_config() if callable(text_config) else config


def check_causal(model: nn.Module) -> None:
    """Refuse a model that is known to predict something else than the next token.

    By its configuration and class: an untrained masked model's loss is about log(vocabulary),
    whichever token it is asked for, and so is a causal one's.

    Args:
        model: Unwrapped by `unwrap`.

    Raises:
        HeadError: If it is an encoder with a decoder, a masked language model, or an encoder that
            was not made a decoder.
    """
    inner = getattr(model, "get_base_model", None)
    base = inner() if callable(inner) else model
    kinds = [kind for kind in type(base).__mro__ if kind.__module__.startswith("transformers.")]
    config, what = getattr(base, "config", None), None
    if getattr(config, "is_encoder_decoder", False):
        what = "an encoder with a decoder (config.is_encoder_decoder)"
    elif kinds:
        # Names of classes, and no class: loaded as the model is, and not before.
        from transformers.models.auto import modeling_auto as auto

        names = {kind.__name__ for kind in kinds}
        causal, masked = (
            auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        )
        only_masked = set(masked.values()) - set(causal.values())
        only_causal = set(causal.values()) - set(masked.values())
        # Of these types the causal class, too, looks ahead unless it is told that it is a decoder.
        either = getattr(config, "model_type", None) in masked.keys() & causal.keys()
        if names & only_masked:
            what = "a masked language model"
        elif either and names & only_causal and not getattr(config, "is_decoder", True):
            what = "an encoder that sees what comes after a token (config.is_decoder is False)"
    if what is not None:
        raise HeadError(
            f"model must predict the next token, got {type(base).__name__}, {what}; {CURE}."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitTransform:
    """What a model does to the head's output before the loss: cap * tanh(scale * z / cap).

    Attributes:
        scale: Factor on the head's output.
        cap: Soft cap, or None.
    """

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, model: nn.Module) -> LogitTransform:
        """Read it from the model's configuration (Gemma, Cohere, Granite, Falcon-H1, ...)."""
        config = _text_config(model)

        def number(name: str) -> float | None:
            value = getattr(config, name, None)
            plain = isinstance(value, int | float) and not isinstance(value, bool)
            return float(value) if plain and value else None

        scale = number("logit_scale") or number("lm_head_multiplier") or 1.0
        scale /= number("logits_scaling") or 1.0
        cap = number("final_logit_softcapping") or number("logits_soft_cap")
        return cls(scale=scale, cap=cap or number("output_logit_soft_cap"))

    def apply_(self, logits: Tensor) -> Tensor | None:
        """Transform logits in place.

        Returns:
            The derivative, of the same shape and without the scale; None where it is 1.
        """
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.cap is None:
            return None
        logits.div_(self.cap).tanh_()
        slope = 1.0 - logits * logits
        logits.mul_(self.cap)
        return slope


def accepted(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the names that the model's forward takes, an adapter's base model's for an adapter.

    A forward that names nothing but **kwargs takes all of them.
    """
    inner = getattr(model, "get_base_model", None)
    forward = (inner() if callable(inner) else model).forward
    parameters = inspect.signature(forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    if kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return list(names) if inspect.Parameter.VAR_KEYWORD in kinds else []
    return [name for name in names if name in parameters]


def call_inputs(model: nn.Module, batch: Any) -> dict[str, Any]:
    """The entries of a collated batch that the model's forward takes, labels left out.

    Raises:
        HeadError: If the batch is no mapping, so that nobody knows how to call the model.
    """
    if not isinstance(batch, Mapping):
        raise HeadError(
            f"batch must be a mapping with input_ids and labels, got {type(batch).__name__}; {CURE}"
            "."
        )
    inputs = {key: batch[key] for key in accepted(model, batch) if key not in _NOT_INPUTS}
    if hasattr(model, "config") and accepted(model, ["use_cache"]):
        inputs["use_cache"] = False  # nobody asks for the keys and values of a probe
    if getattr(_text_config(model), "output_router_logits", False):
        inputs["output_router_logits"] = False  # the loss that balances experts is no sample's
    return inputs


def run_to_head(
    model: nn.Module,
    head: nn.Module,
    inputs: Mapping[str, Any],
    consume: Callable[[Tensor], None],
) -> Any:
    """Call the root module and hand what enters its head to `consume`.

    Args:
        model: Root module, unwrapped by `unwrap`.
        head: Its head; within `consume`, `head.forward` may be called and its weights are there.
        inputs: Keyword arguments of the call.
        consume: Receives (batch, tokens, hidden), or whatever layout the head works on.

    Returns:
        The model's output, whose logits are of one token only where the head was called.

    Raises:
        HeadError: If nothing entered the head and no body's output could be caught either.
    """
    calls = 0
    body_output: list[Any] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise HeadError(f"head must be called once in a forward, got another call; {CURE}.")
        name, hidden = (None, args[0]) if args else next(iter(kwargs.items()))
        consume(hidden)
        if hidden.ndim != 3:
            return None
        one = hidden[:, -1:]
        return ((one, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: one})

    body = find_body(model)
    handles = [head.register_forward_pre_hook(enter, with_kwargs=True)]
    if body is not None:
        handles.append(body.register_forward_hook(lambda *call: body_output.append(call[2])))
    try:
        output = model(**inputs)
        if not calls:
            # Heads that are never called (fused losses use their weight): the body's output is
            # what would have entered.
            if not body_output:
                raise HeadError(
                    f"head must be called by the model's forward, got no call of "
                    f"{type(head).__name__}; {CURE}."
                )
            consume(hidden_of(body_output[-1]))
    finally:
        for handle in handles:
            handle.remove()
    return output


@contextmanager
def gradients_from_head(head: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside: a forward records gradients from the head's output on, and from nowhere earlier.

    Yields:
        A list that receives, for each call of the head, what entered and what left it; what left
        it requires grad, the graph of what entered it was never made.
    """
    calls: list[tuple[Tensor, Tensor]] = []

    def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        entered = args[0] if args else next(iter(kwargs.values()))
        output = output.detach().requires_grad_(True)
        calls.append((entered, output))
        # From here to the loss the graph is needed; the caller's no_grad was for the body.
        torch.set_grad_enabled(True)
        return output

    handle = head.register_forward_hook(leave, with_kwargs=True)
    try:
        with torch.no_grad():
            yield calls
    finally:
        handle.remove()


@contextmanager
def quiet(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside: evaluation mode. Afterwards: modes, buffers and all RNG states as before."""
    modes = [(m, m.training) for m in model.modules() if not _repacks(m)]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _buffers_kept(model), _no_casts_kept(device):
        # Not by eval(): where that does more (merges LoRA weights, say), putting back the mode
        # would not undo it.
        for module, _ in modes:
            module.training = False
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _repacks(module: nn.Module) -> bool:
    """Whether a layer would change its weights for good in evaluation mode.

    4-bit layers of bitsandbytes do on CPUs: they pack them for faster kernels, of other precision,
    at the first call without gradients. The mode is nothing else to them.
    """
    return type(module).__module__.partition(".")[0] == "bitsandbytes"


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards: buffers, and numbers and tensors that stand beside them, as before.

    Most models change none outside of training. Dynamic RoPE does: it widens its frequencies for
    the longest text that it has met, for all that come after. What is larger than a few numbers
    (quantised weights are buffers, too) is put back where it was replaced, and not copied.
    """
    kept = []
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        if buffers:
            beside = {n: v for n, v in vars(module).items() if isinstance(v, int | float | Tensor)}
            kept.append((module, buffers, beside))
    copies = [
        (buffer, buffer._version, buffer.clone())
        for _, buffers, _ in kept
        for buffer in buffers.values()
        if buffer.numel() <= _MAX_COPIED and not buffer.is_inference()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, version, copy in copies:
                # Else it is left alone: a backward that is to come may count its versions.
                if buffer._version != version:
                    buffer.copy_(copy)
        for module, buffers, beside in kept:
            for name, value in (buffers | beside).items():
                if getattr(module, name, None) is not value:
                    setattr(module, name, value)


def _no_casts_kept(device: torch.device) -> AbstractContextManager[Any]:
    """Inside a region of autocast, its cache is off: a probe would read weights as they were cast
    before the optimizer's step, and the region's next forwards those of the probe."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with every tensor in it on the device; other values as they are."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        moved = [to_device(value, device) for value in batch]
        return moved if isinstance(batch, list) else tuple(moved)
    return batch
