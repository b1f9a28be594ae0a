"""The models that runs start from or are told by: trained here, or a pretrained one as it is."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from slap_stream import per_sample_loss
from slap_stream.text.chat import DEFAULT_CHAT_TEMPLATE
from slap_stream.text.collate import ChatCollator
from tools.bench.selection.schedule import Preset, rate
from tools.bench.selection.scoring import encoded
from tools.bench.selection.tasks import Record

CHATML_START = "<|im_start|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def keep_tokenizer(model: Path, place: Path) -> None:
    """Save a pretrained model's tokenizer, without the system turn that its template may put in
    front: it would be a quarter of the tokens of records of this size, the same for all."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if CHATML_START in tokenizer.get_vocab():
        tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(place)


def train_tokenizer(records: Sequence[Record], preset: Preset, place: Path) -> None:
    """Save a byte-level BPE tokenizer of the records' texts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=preset.vocabulary,
        special_tokens=["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(
        (turn["content"] for record in records for turn in record["messages"]), trainer
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    tokenizer.save_pretrained(place)


def pretrain(records: Sequence[Record], tokenizer: Any, preset: Preset, place: Path) -> None:
    """Save a small Llama trained on the records' texts, prompts and all."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=preset.hidden,
            intermediate_size=preset.hidden * 11 // 4,
            num_hidden_layers=preset.layers,
            num_attention_heads=max(1, preset.hidden // 32),
            max_position_embeddings=preset.max_tokens,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    ).to(preset.device)
    rows = _rows(records, tokenizer, preset.max_tokens)
    draws = torch.Generator().manual_seed(1)
    batches = [
        rows[torch.randint(len(rows), (preset.batch_size,), generator=draws)]
        for _ in range(preset.pretraining_steps)
    ]

    def loss(ids: torch.Tensor) -> torch.Tensor:
        ids = ids.to(preset.device)
        return per_sample_loss(model(input_ids=ids).logits, ids).mean()

    _train(model, batches, loss, preset.pretraining_rate, preset)
    model.save_pretrained(place)


def train_reference(
    records: Sequence[Record], model: Any, tokenizer: Any, preset: Preset, place: Path
) -> None:
    """Save a model fine-tuned on clean records, with its tokenizer."""
    records, size = list(records), preset.batch_size
    random.Random("reference").shuffle(records)
    rows = [tokens for _, tokens in encoded(records, tokenizer, preset.max_tokens)]
    model, collate = model.to(preset.device), ChatCollator(tokenizer)
    batches = [rows[at : at + size] for at in range(0, len(rows) - size + 1, size)]

    def loss(part: list[dict[str, Any]]) -> torch.Tensor:
        batch = {name: value.to(preset.device) for name, value in collate(part).items()}
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return per_sample_loss(logits, batch["labels"]).mean()

    _train(model, batches * preset.epochs, loss, preset.rate_for(1.0), preset)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)


def adapted(path: Path, lora: bool) -> Any:
    """A pretrained model, with new adapters on all its linear layers if these are trained."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def _train(
    model: Any,
    batches: Sequence[Any],
    loss: Callable[[Any], torch.Tensor],
    peak: float,
    preset: Preset,
) -> None:
    """One step a batch, the learning rate decaying from `peak` over them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = peak * rate(step / len(batches))
        with preset.autocast():
            found = loss(batch)
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _rows(records: Sequence[Record], tokenizer: Any, width: int) -> torch.Tensor:
    """(rows, width) texts one after the other, an end mark between them."""
    ids: list[int] = []
    for record in records:
        text = "\n".join(turn["content"] for turn in record["messages"])
        ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(ids[: len(ids) // width * width]).view(-1, width)
