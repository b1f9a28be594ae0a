"""Models that predict something else than the next token are told by what they are."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers

from slap_stream import LearnabilityProbe
from slap_stream.errors import HeadError
from slap_stream.integrations.trainer_forward import TrainingForward
from slap_stream.probe.head import check_causal
from tests.helpers.probe_host import Host
from tests.helpers.tiny_models import llama

SMALL = {
    "vocab_size": 32,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
}
T5 = {"vocab_size": 32, "d_model": 8, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1}
BART = {
    "vocab_size": 32,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 1,
    "decoder_attention_heads": 1,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
}


def bert(kind: str, **settings: Any) -> Any:
    return getattr(transformers, kind)(transformers.BertConfig(**SMALL, **settings))


def bart(kind: str) -> Any:
    return getattr(transformers, kind)(transformers.BartConfig(**BART))


MASKED = "a masked language model; pass head="
ENCODER = (
    r"an encoder that sees what comes after a token \(config.is_decoder is False\); pass head="
)
BOTH = r"an encoder with a decoder \(config.is_encoder_decoder\); pass head="


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: bert("BertForMaskedLM"), f"BertForMaskedLM, {MASKED}"),
        (lambda: bert("BertLMHeadModel"), f"BertLMHeadModel, {ENCODER}"),
        (lambda: bart("BartForConditionalGeneration"), BOTH),
        (lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)), BOTH),
        (
            lambda: peft.get_peft_model(
                bert("BertForMaskedLM"), peft.LoraConfig(target_modules=["query"])
            ),
            MASKED,
        ),
    ],
    ids=["masked", "encoder", "bart", "t5", "lora"],
)
def test_they_are_refused(model: Any, message: str) -> None:
    with pytest.raises(HeadError, match=f"model must predict the next token, got .*{message}"):
        check_causal(model())


@pytest.mark.parametrize(
    "model",
    [
        lambda: bert("BertLMHeadModel", is_decoder=True),
        lambda: bart("BartForCausalLM"),
        llama,
        lambda: torch.nn.Linear(2, 2),
    ],
    ids=["decoder", "bart", "llama", "none of transformers"],
)
def test_causal_ones_and_unknown_ones_are_not(model: Any) -> None:
    check_causal(model())


def test_both_the_probe_and_a_trainer_ask() -> None:
    model = bert("BertForMaskedLM")
    with pytest.raises(HeadError, match="a masked language model"):
        LearnabilityProbe(model, Host())
    forward = TrainingForward()
    ids = torch.ones((1, 4), dtype=torch.int64)
    with forward.watched(model, None):
        model(input_ids=ids, labels=ids)
        with pytest.raises(HeadError, match="a masked language model"):
            forward.losses(forward.outputs, ids)
