"""A tiny language model with its tokenizer, on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.helpers.embed_samples import WORDS


def save_tokenizer(path: Path, words: list[str], *, max_length: int = 64) -> None:
    """A tokenizer of these words."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="</s>",
        model_max_length=max_length,
    ).save_pretrained(path)


def save_llama(path: Path) -> None:
    """An untrained Llama of 40 tokens, with a window of 24."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    save_tokenizer(path, WORDS)
