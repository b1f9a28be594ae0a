"""Tiny random models of the layouts that the probe reads, made in milliseconds, no download."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY, HIDDEN = 61, 16
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def spread(model: nn.Module, factor: float = 12.0) -> nn.Module:
    """The model with larger logits than a random one has, so that losses tell models apart."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(factor)
    return model


def llama(**settings):
    return spread(LlamaForCausalLM(LlamaConfig(**{**_SHAPE, **settings})))


def glm():
    return spread(GlmForCausalLM(GlmConfig(**_SHAPE, head_dim=8)))


def gpt2():
    shape = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 2, "n_positions": 64}
    config = GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **shape)
    return spread(GPT2LMHeadModel(config))


def gemma2():
    config = Gemma2Config(**_SHAPE, head_dim=8, final_logit_softcapping=2.0)
    return spread(Gemma2ForCausalLM(config))


def cohere():
    return spread(CohereForCausalLM(CohereConfig(**_SHAPE, logit_scale=0.25)))


def granite():
    return spread(GraniteForCausalLM(GraniteConfig(**_SHAPE, logits_scaling=3.0)))


def qwen2():
    return spread(Qwen2ForCausalLM(Qwen2Config(**_SHAPE)))


def qwen2_lora(target_modules=("q_proj", "v_proj"), **settings):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2, lora_dropout=0.1, target_modules=list(target_modules), task_type="CAUSAL_LM",
        init_lora_weights=False, **settings,
    )  # fmt: skip
    return get_peft_model(qwen2(), config)


class ChatGLM(nn.Module):
    """The layout of the ChatGLM repositories: states and head are (tokens, batch, ...)."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.transformer.mix = nn.GRU(HIDDEN, HIDDEN)
        self.transformer.output_layer = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, input_ids, attention_mask=None, labels=None):
        states, _ = self.transformer.mix(self.transformer.embedding(input_ids).transpose(0, 1))
        logits = self.transformer.output_layer(3 * states).transpose(0, 1)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1)
            )
        return SimpleNamespace(loss=loss, logits=logits)


class FusedLlama(LlamaForCausalLM):
    """A fused loss: the head's weight is used, the head is never called."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        states = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        loss = None
        if labels is not None:
            logits = states[:, :-1].flatten(0, 1) @ self.lm_head.weight.T
            loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss)


def fused_llama():
    return spread(FusedLlama(LlamaConfig(**_SHAPE)))


class Classifier(nn.Module):
    """A plain torch model: one prediction a sample, a head somewhere inside, a scale after it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, HIDDEN), nn.Tanh(), nn.Dropout(0.5))
        self.out = nn.Linear(HIDDEN, 7)

    def forward(self, x):
        return 2.0 * self.out(self.body(x))


MODELS = {
    "llama": llama,
    "tied_llama": lambda: llama(tie_word_embeddings=True),
    "glm": glm,
    "chatglm": ChatGLM,
    "gpt2": gpt2,
    "gemma2": gemma2,
    "cohere": cohere,
    "granite": granite,
    "fused_llama": fused_llama,
    "qwen2_lora": qwen2_lora,
    "qwen2_lora_head": lambda: qwen2_lora(("q_proj", "lm_head")),
    "qwen2_saved_head": lambda: qwen2_lora(modules_to_save=["lm_head"]),
}
