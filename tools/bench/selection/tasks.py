"""Tasks, mixtures of them, and the dirt that is added: which records a benchmark trains on."""

from __future__ import annotations

import gzip
import json
import random
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slap_stream.errors import ConfigError, CorpusError
from tools.bench.selection.copies import near_copy
from tools.bench.selection.dirt import add_mixed, shuffle_targets

Record = dict[str, Any]

# Share of the training set that is near-copies, and share of targets that is shuffled.
COPY_SHARE, SHUFFLED_SHARE = 0.2, 0.2
# Near-copies are of this share of the records, so that each copied record has many copies.
COPIED_RECORDS = 0.015
SHINGLE_WORDS = 8
# Sentences in other languages that answers are replaced with.
FOREIGN = 2_000
# Of the training files, one record in so many is for the tokenizer and the base model alone.
ONE_FOR_PRETRAINING_IN = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One set of records and how much of a record is used.

    Attributes:
        name: File stem, and name of the source in the benchmark's corpora.
        max_characters: Longer records are left out; of a dialogue the first turns are kept.
        cut_turns: Whether a long record is cut after a whole turn of the assistant.
    """

    name: str
    max_characters: int
    cut_turns: bool = False


TASKS = {
    task.name: task
    for task in (
        Task(name="t0_50k", max_characters=300),
        Task(name="sgd", max_characters=300, cut_turns=True),
        Task(name="tatoeba", max_characters=200),
        Task(name="gsm8k", max_characters=400),
        Task(name="alpaca_en", max_characters=400),
    )
}
# What the small model's tokenizer and weights come from.
PRETRAINING = ("t0_50k", "sgd", "tatoeba", "gsm8k")

# Shares of the tasks in the benchmark's mixtures.
MIXTURES: dict[str, dict[str, float]] = {
    "balanced": {"t0_50k": 0.4, "sgd": 0.225, "tatoeba": 0.225, "gsm8k": 0.15},
    "imbalanced": {"t0_50k": 0.65, "sgd": 0.2, "tatoeba": 0.1, "gsm8k": 0.05},
    "questions": {"t0_50k": 0.6, "gsm8k": 0.4},
    "five": dict.fromkeys(TASKS, 0.2),
} | {name: {name: 1.0} for name in TASKS}


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """What a corpus is made of.

    Attributes:
        mixture: Name in `MIXTURES`.
        copies: Whether near-duplicates are added, `COPY_SHARE` of the result.
        shuffled: Whether targets are shuffled within their source, `SHUFFLED_SHARE` of the result.
        mixed: Percentage that is dirty in one of the ways of `dirt.MIXED`, in equal parts.
    """

    mixture: str
    copies: bool = False
    shuffled: bool = False
    mixed: int = 0

    @property
    def name(self) -> str:
        """Such as `imbalanced+copies+shuffled` or `five+mixed30`."""
        parts = [self.mixture, *(part for part in ("copies", "shuffled") if getattr(self, part))]
        return "+".join([*parts, *([f"mixed{self.mixed}"] if self.mixed else [])])

    @classmethod
    def of(cls, name: str) -> Condition:
        """Inverse of `name`.

        Raises:
            ValueError: If there is no such mixture or dirt.
        """
        mixture, *dirt = name.split("+")
        mixed = re.fullmatch(r"mixed([1-9]\d?)", dirt[0]) if len(dirt) == 1 else None
        if mixture in MIXTURES and mixed:
            return cls(mixture=mixture, mixed=int(mixed[1]))
        if mixture not in MIXTURES or not set(dirt) <= {"copies", "shuffled"}:
            raise ConfigError(
                f"condition must be one of {', '.join(MIXTURES)}, with +copies or +shuffled or "
                f"both, or with +mixed and a percentage, got {name!r}."
            )
        return cls(mixture=mixture, copies="copies" in dirt, shuffled="shuffled" in dirt)


def read_task(data: Path, task: Task, part: str) -> Iterator[Record]:
    """Usable records of `DATA/TASK.PART.jsonl.gz`, with the task as their source.

    Raises:
        CorpusError: If the file is not there.
    """
    path = data / f"{task.name}.{part}.jsonl.gz"
    if not path.is_file():
        raise CorpusError(f"data must hold {path.name}, got no such file in {str(data)!r}.")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            messages = record["messages"]
            if task.cut_turns:
                messages = _first_turns(messages, task.max_characters)
            size = sum(len(turn["content"]) for turn in messages)
            if messages and size <= task.max_characters:
                yield {
                    "id": record["id"],
                    "source": task.name,
                    "messages": messages,
                    "template": record["source"],
                }


def split_training(
    data: Path, name: str, *, limit: int | None = None
) -> tuple[list[Record], list[Record]]:
    """A task's training records: for pre-training, and for fine-tuning.

    Args:
        data: Directory of the task files.
        name: Task.
        limit: Most records for pre-training.
    """
    parts: tuple[list[Record], list[Record]] = ([], [])
    for record in read_task(data, TASKS[name], "train"):
        digest = zlib.crc32(record["id"].encode())
        parts[digest % ONE_FOR_PRETRAINING_IN > 0].append(record)
    random.Random(f"pretraining {name}").shuffle(parts[0])
    return parts[0][:limit], parts[1]


def _first_turns(messages: list[dict[str, str]], most: int) -> list[dict[str, str]]:
    """The longest beginning that ends with the assistant and has at most so many characters."""
    size, end = 0, 0
    for place, turn in enumerate(messages):
        size += len(turn["content"])
        if size > most:
            break
        if turn["role"] == "assistant":
            end = place + 1
    return messages[:end]


def heldout_records(
    data: Path, mixture: str, per_task: Mapping[str, int], seen: Sequence[Record]
) -> list[Record]:
    """Test records of a mixture's tasks that share little with each other and with `seen`.

    A record is left out if more than half of its word sequences of `SHINGLE_WORDS` occur in a
    training record, or in a record held out before.
    """
    known = {shingle for record in seen for shingle in _shingles(record)}
    chosen: list[Record] = []
    for name in MIXTURES[mixture]:
        records = list(read_task(data, TASKS[name], "test"))
        random.Random(f"heldout {name}").shuffle(records)
        taken = 0
        for record in records:
            shingles = _shingles(record)
            if len(shingles & known) * 2 > len(shingles):
                continue
            known |= shingles
            chosen.append(record)
            taken += 1
            if taken == per_task[name]:
                break
    return chosen


def _shingles(record: Record) -> set[str]:
    words = " ".join(turn["content"] for turn in record["messages"]).lower().split()
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return {" ".join(words[start : start + SHINGLE_WORDS]) for start in range(last)}


def training_records(data: Path, condition: Condition, size: int, seed: int) -> list[Record]:
    """The training records of a condition; `kind` says what each is.

    Args:
        data: Directory of the task files.
        condition: Mixture and dirt.
        size: Clean records, or as many as a task alone has; near-copies are added to them.
        seed: Which records, and which of them are dirty.

    Returns:
        Records with `id`, `source`, `messages`, and `kind`: `clean`, `shuffled`, `first` (the
        record that near-copies were made of), `copy`, or one of `dirt.MIXED`. Ids carry the kind.
    """
    rng = random.Random(f"{condition.name} {seed}")
    records: list[Record] = []
    for name, share in MIXTURES[condition.mixture].items():
        _, usable = split_training(data, name)
        wanted = round(size * share)
        if len(usable) < wanted and share < 1.0:
            raise CorpusError(
                f"{name} must have {wanted} records of at most {TASKS[name].max_characters} "
                f"characters for this mixture, got {len(usable)}; take the task alone, or a "
                "smaller preset."
            )
        wanted = min(wanted, len(usable))
        records += rng.sample(usable, wanted)
    for record in records:
        record["kind"] = "clean"
    total = round(len(records) / (1.0 - COPY_SHARE)) if condition.copies else len(records)
    rng.shuffle(records)
    if condition.copies:
        firsts = records[: max(1, round(COPIED_RECORDS * len(records)))]
        for record in firsts:
            record["kind"] = "first"
        copies = total - len(records)
        records += [near_copy(firsts[n % len(firsts)], n, rng) for n in range(copies)]
    if condition.mixed:
        sentences, _ = split_training(data, "tatoeba", limit=FOREIGN)
        # "Translate Afrikaans to English: ..."
        foreign = [r["messages"][0]["content"].partition(": ")[2] for r in sentences]
        records = add_mixed(records, condition.mixed / 100, foreign, rng)
    if condition.shuffled:
        for name in MIXTURES[condition.mixture]:
            mine = [r for r in records if r["source"] == name and r["kind"] == "clean"]
            everyone = sum(r["source"] == name for r in records)
            shuffle_targets(mine[: round(SHUFFLED_SHARE * everyone)], rng)
    for record in records:
        record["id"] = f"{record['kind']}:{record['id']}"
    return records
