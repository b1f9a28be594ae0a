"""Scores of what a fine-tuned model writes: chrF of translations, exact answers in maths.

chrF comes from sacrebleu, the reference implementation of the metric: scores of different
implementations cannot be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tools.bench.selection.schedule import Preset
from tools.bench.selection.scoring import encoded
from tools.bench.selection.tasks import Record

GENERATION_BATCH = 64
# A translation may be longer than the reference; what runs on beyond this has gone astray.
LONGER_THAN_REFERENCE = 1.5
ANSWER_MARK = "####"


def chrf(written: Sequence[str], references: Sequence[str]) -> float:
    """Corpus chrF in [0, 100] (Popovic, "chrF", WMT 2015)."""
    from sacrebleu import corpus_chrf

    return float(corpus_chrf(list(written), [list(references)]).score)


def exact_answers(written: Sequence[str], references: Sequence[str]) -> float:
    """Percentage of texts whose number after the last `####` is the reference's."""
    right = [
        final_answer(text) == final_answer(reference) != ""
        for text, reference in zip(written, references, strict=True)
    ]
    return 100.0 * sum(right) / len(right)


def final_answer(text: str) -> str:
    """What stands after the last `####`, without separators of thousands; "" if nothing does."""
    _, mark, answer = text.rpartition(ANSWER_MARK)
    return answer.strip().replace(",", "").rstrip(".") if mark else ""


# What says how good a generated text of a task is.
METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "tatoeba": chrf,
    "gsm8k": exact_answers,
}


def generation_scores(
    model: Any, tokenizer: Any, records: Sequence[Record], preset: Preset
) -> dict[str, float]:
    """Score by task of what the model writes greedily for held-out prompts.

    Args:
        model: Causal language model, on the preset's device.
        tokenizer: Its tokenizer.
        records: Held-out records; those of tasks in `preset.generated` are answered.
        preset: Sizes.

    Returns:
        Score of each task of `preset.generated` that has records.
    """
    result = {}
    for task in preset.generated:
        chosen = [record for record in records if record["source"] == task]
        rows = [row for _, row in encoded(chosen, tokenizer, preset.max_tokens)]
        rows.sort(key=lambda row: row["supervised"].index(True))
        written: list[str] = []
        references: list[str] = []
        for start in range(0, len(rows), GENERATION_BATCH):
            pairs = [_split(row) for row in rows[start : start + GENERATION_BATCH]]
            written += _write(model, tokenizer, pairs, preset)
            references += [tokenizer.decode(ids, skip_special_tokens=True) for _, ids in pairs]
        if rows:
            result[task] = METRICS[task](written, references)
    return result


def _split(row: dict[str, list[Any]]) -> tuple[list[int], list[int]]:
    """Tokens before the answer, and the answer's."""
    start = row["supervised"].index(True)
    return row["input_ids"][:start], row["input_ids"][start:]


@torch.no_grad()
def _write(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[list[int], list[int]]], preset: Preset
) -> list[str]:
    """Greedy answers to a batch of prompts, padded on the left."""
    width = max(len(prompt) for prompt, _ in pairs)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt, _ in pairs])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in pairs])
    model.eval()
    with preset.autocast():
        full = model.generate(
            ids.to(preset.device),
            attention_mask=mask.to(preset.device),
            max_new_tokens=int(LONGER_THAN_REFERENCE * max(len(answer) for _, answer in pairs)),
            do_sample=False,
        )
    model.train()
    return list(tokenizer.batch_decode(full[:, width:], skip_special_tokens=True))
