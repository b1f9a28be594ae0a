"""Starting points of all runs, made once and kept: tokenizer, base model, corpora, tests."""

from __future__ import annotations

import fcntl
import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from slap_stream import EmbeddingStore
from slap_stream.cli import convert, embed
from slap_stream.embeddings.corpus_texts import CorpusTexts
from slap_stream.embeddings.embed import embed as embed_corpus
from slap_stream.embeddings.encoders import HashingEncoder
from slap_stream.embeddings.features import HashedTfidf
from slap_stream.errors import SlapStreamError
from slap_stream.shards.index import corpus_size
from slap_stream.shards.reader import iter_corpus
from slap_stream.text.sample import from_messages
from tools.bench.selection.dirt import MIXED
from tools.bench.selection.models import (
    adapted,
    keep_tokenizer,
    pretrain,
    train_reference,
    train_tokenizer,
)
from tools.bench.selection.schedule import Preset
from tools.bench.selection.scoring import instruction_difficulty
from tools.bench.selection.subsets import CHOICES, Known
from tools.bench.selection.tasks import (
    MIXTURES,
    PRETRAINING,
    Condition,
    Record,
    heldout_records,
    split_training,
    training_records,
)

# Kinds that repeat a record of the kind `first`.
COPIES = ("copy", "exact")
# Records of a target set, and of these how many nearest ones a similarity is the mean of.
NUM_EXAMPLES, NEAREST = 50, 5
KINDS = ("clean", "first", *dict.fromkeys(("copy", "shuffled", *MIXED)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """A corpus on disk with what the benchmark alone knows about it.

    Attributes:
        path: Directory of shards and embeddings.
        kind: (num_samples,) index into `KINDS`.
        group: (num_samples,) number of the record that near-copies were made of; -1 if none.
        prepared: Tokens that a model read to choose it.
    """

    path: Path
    kind: NDArray[np.int64]
    group: NDArray[np.int64]
    prepared: int = 0

    @classmethod
    def read(cls, place: Path) -> Corpus:
        """What stands in a directory of the workshop."""
        table, prepared = np.load(place / "kinds.npz"), place / "prepared.json"
        return cls(
            path=place / "corpus",
            kind=table["kind"],
            group=table["group"],
            prepared=json.loads(prepared.read_text()) if prepared.exists() else 0,
        )

    def is_of(self, kinds: Sequence[str]) -> NDArray[np.bool_]:
        """(num_samples,) whether a sample is of one of these kinds."""
        return np.isin(self.kind, [KINDS.index(kind) for kind in kinds])


class Workshop:
    """Makes and keeps everything that several runs share, below one directory.

    Args:
        data: Directory of the task files.
        out: Directory of the benchmark.
        preset: Sizes.
    """

    def __init__(self, data: Path, out: Path, preset: Preset) -> None:
        self.data, self.preset = data, preset
        self.place = out / f"made-{preset.name}"
        self.place.mkdir(parents=True, exist_ok=True)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The pretrained model's, or a byte-level BPE tokenizer of all tasks' training texts."""
        tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(self._tokenizer_path())
        return tokenizer

    def _tokenizer_path(self) -> Path:
        def write(place: Path) -> None:
            if self.preset.model is not None:
                keep_tokenizer(self.preset.model, place)
            else:
                train_tokenizer(self._pretraining(), self.preset, place)

        return self._make("tokenizer", write)

    def base_model(self) -> Any:
        """The pretrained model, or one trained on the tasks' training texts, prompts and all."""
        if self.preset.model is not None:
            return adapted(self.preset.model, self.preset.lora)
        path = self._make(
            "base-model",
            lambda place: pretrain(self._pretraining(), self.tokenizer(), self.preset, place),
        )
        model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(path)
        return model

    def corpus(self, condition: Condition, seed: int) -> Corpus:
        """Shards and embeddings of a condition; its records depend on the seed."""

        def write(place: Path) -> None:
            records = training_records(self.data, condition, self.preset.size, seed)
            self._write(place, records, seed)

        return Corpus.read(self._make(f"{condition.name}-{seed}", write))

    def chosen(
        self, condition: Condition, seed: int, choice: str, share: float, aim: str | None = None
    ) -> Corpus:
        """What a baseline leaves of a condition's corpus."""
        known, read = self._known(condition, seed, share, aim)

        def write(place: Path) -> None:
            left = CHOICES[choice](known)
            records = [r for r, stays in zip(known.records, left, strict=True) if stays]
            self._write(place, records, seed)
            (place / "prepared.json").write_text(json.dumps(sum(read)))

        name = f"{condition.name}-{seed}-{choice}-{share}{'' if aim is None else '-' + aim}"
        return Corpus.read(self._make(name, write))

    def _known(
        self, condition: Condition, seed: int, share: float, aim: str | None
    ) -> tuple[Known, list[int]]:
        """What baselines may look at, and the tokens that looking takes, once it is done."""
        corpus, read = self.corpus(condition, seed), list[int]()
        records = {
            record["id"]: record
            for record in training_records(self.data, condition, self.preset.size, seed)
        }
        samples = iter_corpus(corpus.path, 0, corpus_size(corpus.path))
        mine = [records[sample["id"]] for sample in samples]
        store = EmbeddingStore(corpus.path / "embeddings.zarr")
        rows = store.read(0, store.shape[0]).embedding.astype(np.float32)
        norms = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

        def difficulty() -> NDArray[np.float64]:
            model = self.base_model().to(self.preset.device)
            ratio, tokens = instruction_difficulty(mine, model, self.tokenizer(), self.preset)
            read.append(tokens)
            return ratio

        def nearness() -> NDArray[np.float64]:
            assert aim is not None, "only arms with an aim choose by it"
            return nearness_to(self.examples(aim), corpus.path)

        return Known(
            records=mine,
            embeddings=rows / norms,
            keep=share,
            aim=aim,
            nearness=nearness,
            instruction_difficulty=difficulty,
        ), read

    def examples(self, aim: str) -> list[Record]:
        """Examples of a task, of what the base model was trained on."""
        return split_training(self.data, aim, limit=NUM_EXAMPLES)[0]

    def aimed_store(self, condition: Condition, seed: int, aim: str) -> Path:
        """Embeddings of a condition's corpus, with the relevance to examples of a task."""
        corpus = self.corpus(condition, seed).path

        def write(place: Path) -> None:
            lines = [json.dumps({"messages": r["messages"]}) for r in self.examples(aim)]
            (place / "target.jsonl").write_text("\n".join(lines))
            store = place / "embeddings.zarr"
            _command(embed, corpus, "--out", store, "--target", place / "target.jsonl", "--quiet")

        return self._make(f"aimed-{condition.name}-{seed}-{aim}", write) / "embeddings.zarr"

    def reference_store(self, condition: Condition, seed: int) -> Path:
        """Embeddings of a condition's corpus, with the losses of a reference model beside them.

        The reference is the base model fine-tuned on clean records that no run is trained on.
        """
        corpus = self.corpus(condition, seed).path
        model = self._make(
            f"reference-{condition.mixture}",
            lambda place: train_reference(
                self.target(condition.mixture, self.preset.size // 2),
                self.base_model(),
                self.tokenizer(),
                self.preset,
                place,
            ),
        )

        def write(place: Path) -> None:
            store = place / "embeddings.zarr"
            _command(embed, corpus, "--out", store, "--reference-model", model, "--quiet")

        return self._make(f"referred-{condition.name}-{seed}", write) / "embeddings.zarr"

    def judged_store(self, condition: Condition, seed: int) -> tuple[Path, int]:
        """Embeddings of a condition's corpus that the base model has read the beginnings of, and
        the tokens that it has read."""
        corpus = self.corpus(condition, seed).path

        def write(place: Path) -> None:
            model = place / "model"
            self.base_model().save_pretrained(model)
            self.tokenizer().save_pretrained(model)
            report = embed_corpus(
                corpus, out=place / "embeddings.zarr", judge_model=model, progress=False
            )
            shutil.rmtree(model)
            (place / "prepared.json").write_text(json.dumps(report.judge_tokens))

        place = self._make(f"judged-{condition.name}-{seed}", write)
        return place / "embeddings.zarr", json.loads((place / "prepared.json").read_text())

    def heldout(self, mixture: str) -> list[Record]:
        """Clean test records of a mixture's tasks, cleared of near-copies of training texts."""

        def write(place: Path) -> None:
            parts = [split_training(self.data, name) for name in MIXTURES[mixture]]
            seen = [record for both in parts for part in both for record in part]
            sizes = dict.fromkeys(MIXTURES[mixture], self.preset.heldout_per_task)
            sizes |= self.preset.heldout_of
            chosen = heldout_records(self.data, mixture, sizes, seen)
            (place / "records.json").write_text(json.dumps(chosen))

        path = self._make(f"heldout-{mixture}", write)
        records: list[Record] = json.loads((path / "records.json").read_text())
        return records

    def target(self, mixture: str, size: int) -> list[Record]:
        """Clean records from what the base model was trained on, in a mixture's shares."""
        chosen: list[Record] = []
        for name, share in MIXTURES[mixture].items():
            records, _ = split_training(self.data, name, limit=round(share * size))
            chosen += records
        return chosen

    def _make(self, name: str, write: Callable[[Path], None]) -> Path:
        """Make a directory unless it is there; one process at a time, and never half of it."""
        done, growing = self.place / name, self.place / f"{name}.growing"
        with _alone(self.place / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(growing, ignore_errors=True)
                growing.mkdir()
                write(growing)
                growing.rename(done)
        return done

    def _pretraining(self) -> list[Record]:
        """Records of all tasks that no run is fine-tuned on, in a random order."""
        limit = self.preset.pretraining_per_task
        records = [
            r for name in PRETRAINING for r in split_training(self.data, name, limit=limit)[0]
        ]
        random.Random("pretraining order").shuffle(records)
        return records

    def _write(self, place: Path, records: Sequence[Record], seed: int) -> None:
        with (place / "train.jsonl").open("w") as file:
            for record in records:
                kept = {name: record[name] for name in ("id", "source", "messages")}
                file.write(json.dumps(kept) + "\n")
        corpus = place / "corpus"
        _command(
            convert,
            *(place / "train.jsonl", corpus, "--tokenizer", self._tokenizer_path()),
            *("--max-length", self.preset.max_tokens, "--seed", seed),
            *("--shard-bytes", self.preset.shard_bytes, "--quiet"),
        )
        _command(embed, corpus, "--quiet")
        ids = [sample["id"] for sample in iter_corpus(corpus, 0, corpus_size(corpus))]
        np.savez(
            place / "kinds.npz",
            kind=np.array([KINDS.index(name.split(":", 1)[0]) for name in ids]),
            group=np.array(groups_of_copies(ids)),
        )


def nearness_to(examples: Sequence[Record], corpus: Path) -> NDArray[np.float64]:
    """(num_samples,) mean cosine of each sample with the examples nearest to it, by the encoder
    that the corpus was embedded with."""
    texts = CorpusTexts(corpus_dir=corpus).found()
    samples = list(texts.read(0, corpus_size(corpus)))
    tfidf, encoder = HashedTfidf(), HashingEncoder()
    tfidf.fit(samples)
    mine = [from_messages(record["messages"], None) for record in examples]
    theirs, ours = (encoder.encode(some, tfidf.transform(some))[0] for some in (samples, mine))
    similarity = theirs.astype(np.float64) @ ours.T
    nearest: NDArray[np.float64] = np.sort(similarity, axis=1)[:, -NEAREST:].mean(axis=1)
    return nearest


def groups_of_copies(ids: Sequence[str]) -> list[int]:
    """(n,) position of the record that each is a copy of; its own, if it was copied; else -1.

    Where the record itself is not in the corpus, being too long, say, its first copy stands for it.

    Args:
        ids: A kind, a colon and a name each; a copy's name is that of the record and a number.
    """
    kinds, names = zip(*(identity.split(":", 1) for identity in ids), strict=True)
    records = [
        {"first": name, **dict.fromkeys(COPIES, name.rsplit("-", 1)[0])}.get(kind)
        for kind, name in zip(kinds, names, strict=True)
    ]
    place: dict[str, int] = {}
    for wanted in ("first", *COPIES):
        for number, (kind, record) in enumerate(zip(kinds, records, strict=True)):
            if kind == wanted and record is not None:
                place.setdefault(record, number)
    return [-1 if record is None else place[record] for record in records]


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock that ends with this process, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _command(tool: Any, *arguments: object) -> None:
    if tool.main([str(argument) for argument in arguments]):
        raise SlapStreamError(f"{tool.__name__} must succeed, got an error; see above.")
