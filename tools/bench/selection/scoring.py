"""What a model says of records: instruction-following difficulty, and which of a few answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from slap_stream import per_sample_loss
from slap_stream.text.chat import encode
from slap_stream.text.collate import ChatCollator
from tools.bench.selection.dirt import answers, with_answers
from tools.bench.selection.schedule import Preset
from tools.bench.selection.tasks import Record

SCORING_BATCH = 16
# A template is a question with so many answers at most, each of so many characters at most, that
# so many records have.
MOST_OPTIONS, MOST_CHARACTERS, LEAST_RECORDS = 6, 30, 3


def encoded(
    records: Sequence[Record], tokenizer: Any, max_tokens: int
) -> list[tuple[str, dict[str, list[Any]]]]:
    """(source, tokens) of records, those that are cut before the answer left out."""
    result: list[tuple[str, dict[str, list[Any]]]] = []
    for record in records:
        tokens = encode(tokenizer, record["messages"], max_length=max_tokens)
        if any(tokens.supervised[1:]):
            row: dict[str, list[Any]] = {
                "input_ids": tokens.input_ids,
                "supervised": tokens.supervised,
            }
            result.append((record["source"], row))
    return result


@torch.no_grad()
def losses_of(
    rows: Sequence[dict[str, list[Any]]], model: Any, tokenizer: Any, preset: Preset
) -> tuple[NDArray[np.float64], int]:
    """(n,) mean losses of rows of tokens, in their order, and the tokens that were read."""
    order = sorted(range(len(rows)), key=lambda at: len(rows[at]["input_ids"]))
    result, tokens = np.zeros(len(rows)), 0
    collate = ChatCollator(tokenizer)
    training = model.training
    model.eval()
    for start in range(0, len(order), SCORING_BATCH):
        at = order[start : start + SCORING_BATCH]
        batch = {k: v.to(preset.device) for k, v in collate([rows[i] for i in at]).items()}
        with preset.autocast():
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        result[at] = per_sample_loss(logits, batch["labels"]).double().cpu().numpy()
        tokens += batch["input_ids"].numel()
    model.train(training)
    return result, tokens


def instruction_difficulty(
    records: Sequence[Record], model: Any, tokenizer: Any, preset: Preset
) -> tuple[NDArray[np.float64], int]:
    """(n,) loss of the answers given the prompts over that of the answers alone, and the tokens.

    Records that are cut before their answer have infinity.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    whole, alone, places = [], [], []
    for place, record in enumerate(records):
        for _, row in encoded([record], tokenizer, preset.max_tokens):
            pairs = zip(row["input_ids"], row["supervised"], strict=True)
            ids = [token for token, supervised in pairs if supervised]
            whole.append(row)
            alone.append({"input_ids": [start, *ids], "supervised": [False] + [True] * len(ids)})
            places.append(place)
    given, read = losses_of(whole, model, tokenizer, preset)
    free, more = losses_of(alone, model, tokenizer, preset)
    ratio = np.full(len(records), np.inf)
    ratio[places] = given / np.maximum(free, 1e-6)
    return ratio, read + more


def options_of(records: Sequence[Record]) -> dict[str, list[str]]:
    """The answers that each template has, where they are a few short ones."""
    seen: dict[str, list[str]] = defaultdict(list)
    for record in records:
        seen[record["template"]] += answers(record)
    return {
        template: sorted(set(said))
        for template, said in seen.items()
        if 2 <= len(set(said)) <= MOST_OPTIONS
        and len(said) >= LEAST_RECORDS * len(set(said))
        and max(map(len, said)) <= MOST_CHARACTERS
    }


def rank_classification(
    records: Sequence[Record],
    options: dict[str, list[str]],
    model: Any,
    tokenizer: Any,
    preset: Preset,
) -> tuple[float, int]:
    """Percentage of records whose answer is the likeliest of its template's, and how many.

    Reference: Sanh et al., "Multitask Prompted Training Enables Zero-Shot Task Generalization",
    ICLR 2022.
    """
    rows, right, owner = [], [], []
    chosen = [record for record in records if len(answers(record)) == 1]
    for number, record in enumerate(chosen):
        for option in options.get(record["template"], []):
            asked = {**record, "messages": with_answers(record["messages"], [option])}
            for _, row in encoded([asked], tokenizer, preset.max_tokens):
                rows.append(row)
                right.append(option == answers(record)[0])
                owner.append(number)
    losses, _ = losses_of(rows, model, tokenizer, preset)
    scored = sorted({number for number, is_it in zip(owner, right, strict=True) if is_it})
    hits = 0
    for number in scored:
        mine = [place for place, of in enumerate(owner) if of == number]
        hits += right[min(mine, key=lambda place: losses[place])]
    return (100.0 * hits / len(scored) if scored else float("nan")), len(scored)
