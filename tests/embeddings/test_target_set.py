"""Which samples are of the kind that a target set shows, and what that says of the whole corpus."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slap_stream.corpus.convert import convert
from slap_stream.embeddings import target_set
from slap_stream.embeddings.corpus_texts import CorpusTexts
from slap_stream.embeddings.embed import _described
from slap_stream.embeddings.encoders import HashingEncoder
from slap_stream.embeddings.features import HashedTfidf
from slap_stream.embeddings.target_set import Examples, Relevance, kindred_share, read_examples
from slap_stream.errors import CorpusError
from slap_stream.shards.reader import iter_corpus
from slap_stream.text.sample import TextSample
from slap_stream.types import Float32Array
from tests.helpers.embed_models import save_tokenizer
from tests.helpers.embed_samples import LINES, WORDS, pair

NUM = 600
KINDS = [line.split() for line in LINES]


def sample_of(kind: int, number: int) -> TextSample:
    """Words of a kind, with a few of the other among them."""
    rng = random.Random(f"{kind} {number}")
    words = [rng.choice(KINDS[kind if rng.random() < 0.8 else 1 - kind]) for _ in range(14)]
    return pair(" ".join(words[:7]), " ".join(words[7:]))


def corpus_of(share: float) -> tuple[list[TextSample], np.ndarray]:
    """Samples, of which about a share are of the first kind, and which."""
    first = np.random.default_rng(0).random(NUM) < share
    return [sample_of(int(not one), n) for n, one in enumerate(first)], first


CORPUS, FIRST = corpus_of(0.25)
OTHERS = [sample_of(0, NUM + n) for n in range(60)]


class Describer:
    """Embeddings and columns by a fitted encoder, each sample's made once."""

    def __init__(self) -> None:
        self.tfidf, self.encoder = HashedTfidf(), HashingEncoder(64)
        self.tfidf.fit(CORPUS)
        self.made: dict[str, tuple[Float32Array, Float32Array]] = {}

    def __call__(self, samples: Sequence[TextSample]) -> tuple[Float32Array, Float32Array]:
        new = [sample for sample in samples if sample.text not in self.made]
        if new:
            rows = zip(*_described(new, self.tfidf, self.encoder), strict=True)
            self.made.update(zip([sample.text for sample in new], rows, strict=True))
        both = zip(*(self.made[sample.text] for sample in samples), strict=True)
        embedding, columns = map(np.stack, both)
        return embedding, columns


DESCRIBE = Describer()


def relevance_to(examples: Sequence[TextSample]) -> tuple[Relevance, Float32Array]:
    """What is found of the corpus, and (NUM,) relevance of each of its samples."""
    found = Relevance(Examples.of(examples))
    found.fit(CORPUS, DESCRIBE)
    return found, found.relevance(CORPUS, *DESCRIBE(CORPUS))


def test_what_is_of_the_examples_kind_is_found_and_how_much_there_is() -> None:
    found, relevance = relevance_to(OTHERS)
    assert found.share == pytest.approx(FIRST.mean(), abs=0.08)
    # A probability: it sums to as many samples as there are of the kind.
    assert relevance.mean() == pytest.approx(found.share, rel=1e-2)
    assert np.all((relevance >= 0.0) & (relevance <= 1.0))
    assert relevance[FIRST].mean() > 0.75
    assert relevance[~FIRST].mean() < 0.1


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**16), twice=st.integers(0, 20))
def test_neither_the_order_of_the_examples_nor_their_repetition_changes_anything(
    seed: int, twice: int
) -> None:
    examples = OTHERS + OTHERS[:twice]
    random.Random(seed).shuffle(examples)
    again, relevance = relevance_to(examples)
    first, usual = relevance_to(OTHERS)
    assert again.examples.digest == first.examples.digest
    np.testing.assert_array_equal(relevance, usual)


@pytest.mark.parametrize("part", [1.0, 0.5, 0.2])
def test_a_target_set_that_is_the_corpus_or_a_part_of_it_drawn_by_chance_changes_hardly_anything(
    part: float,
) -> None:
    drawn = np.random.default_rng(1).random(NUM) < part
    found, relevance = relevance_to([s for s, one in zip(CORPUS, drawn, strict=True) if one])
    assert found.share > 0.85
    assert relevance.mean() > 0.85
    # Nor does it prefer one of the two kinds.
    assert abs(relevance[FIRST].mean() - relevance[~FIRST].mean()) < 0.1


def test_a_corpus_without_anything_like_the_examples_is_not_taken_for_what_it_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    examples = [pair(f"zürich {n} grüße", f"äpfel {n} übermut {n * n}") for n in range(40)]
    found, relevance = relevance_to(examples)
    assert 0.0 < found.share < 0.05
    assert np.isfinite(relevance).all()
    assert relevance.mean() < 0.05
    assert "next to nothing of the corpus is of the target set's kind (" in caplog.text


def test_a_copy_of_an_example_is_judged_by_who_has_not_seen_the_example() -> None:
    found = Relevance(Examples.of(OTHERS))
    folds = found._folds(target_set.text_digests(found.examples.samples))
    assert sorted(np.bincount(folds)) == [12] * 5
    again = found._folds(target_set.text_digests([*OTHERS, *CORPUS]))
    place = {sample.text: fold for sample, fold in zip(found.examples.samples, folds, strict=True)}
    assert [place[sample.text] for sample in OTHERS] == again[: len(OTHERS)].tolist()


SCORES = hnp.arrays(np.float64, st.integers(1, 60), elements=st.floats(-50, 50))


@given(found=SCORES, given_=SCORES)
def test_the_share_is_one_that_a_corpus_can_have(found: np.ndarray, given_: np.ndarray) -> None:
    share = kindred_share(found, given_)
    assert 0.0 < share <= 1.0
    # What scores as the examples do is of their kind, and more of it is more.
    assert kindred_share(given_, given_) == 1.0
    assert kindred_share(np.append(found, given_.max()), given_) >= share * len(found) / (
        len(found) + 1
    )


def write_lines(path: Path, samples: Sequence[TextSample]) -> Path:
    records = [json.dumps({"messages": sample.messages}) for sample in samples]
    path.write_text("\n".join(records))
    return path


@pytest.mark.parametrize("tokenised", [False, True])
def test_examples_are_the_same_as_lines_and_as_shards(tmp_path: Path, tokenised: bool) -> None:
    save_tokenizer(tmp_path / "tokenizer", WORDS)
    settings = {"tokenizer": tmp_path / "tokenizer", "max_length": 40} if tokenised else {}
    lines = write_lines(tmp_path / "lines.jsonl", OTHERS)
    corpus = tmp_path / "corpus"
    convert(lines, corpus, num_workers=1, **settings)
    texts = CorpusTexts(corpus_dir=corpus).found()
    of_lines, of_shards = (read_examples(path, texts) for path in (lines, corpus))
    assert of_lines.digest == of_shards.digest
    assert [s.text for s in of_lines.samples] == [s.text for s in of_shards.samples]
    assert len(of_lines.samples) == len(OTHERS)


def test_examples_may_be_rows_of_token_ids(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer", WORDS)
    lines, corpus = write_lines(tmp_path / "lines.jsonl", OTHERS), tmp_path / "corpus"
    convert(lines, corpus, num_workers=1, tokenizer=tmp_path / "tokenizer")
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as file:
        for sample in iter_corpus(corpus):
            ids, learnt = sample["input_ids"].tolist(), sample["supervised"].tolist()
            labels = [token if mark else -100 for token, mark in zip(ids, learnt, strict=True)]
            # Padding is no part of an example.
            row = {"input_ids": [*ids, 0], "labels": [*labels, -100]}
            file.write(json.dumps({**row, "attention_mask": [1] * len(ids) + [0]}) + "\n")
    texts = CorpusTexts(corpus_dir=corpus).found()
    assert read_examples(rows, texts).digest == read_examples(corpus, texts).digest


def test_the_tokenizer_that_was_given_reads_shards_that_name_none(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer", WORDS)
    lines, corpus = write_lines(tmp_path / "lines.jsonl", OTHERS), tmp_path / "corpus"
    convert(lines, corpus, num_workers=1, tokenizer=tmp_path / "tokenizer")
    texts = CorpusTexts(corpus_dir=corpus).found()
    known = read_examples(corpus, texts)
    (corpus / "corpus.json").unlink()
    assert read_examples(corpus, texts).digest == known.digest


def test_an_example_that_is_longer_than_the_corpus_cuts_is_read_whole(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer", WORDS)
    short = write_lines(tmp_path / "short.jsonl", OTHERS)
    tokenizer = tmp_path / "tokenizer"
    convert(short, tmp_path / "corpus", num_workers=1, tokenizer=tokenizer, max_length=40)
    texts = CorpusTexts(corpus_dir=tmp_path / "corpus").found()
    long = pair(" ".join(WORDS * 3), "river stone")
    found = read_examples(write_lines(tmp_path / "long.jsonl", [*OTHERS, long]), texts)
    assert len(found.samples) == len(OTHERS) + 1
    assert max(sample.length for sample in found.samples) > 40
    assert "river stone" in [sample.target.strip() for sample in found.samples]


def test_what_is_no_target_set_is_refused_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = write_lines(tmp_path / "lines.jsonl", OTHERS)
    convert(lines, tmp_path / "corpus", num_workers=1)
    texts = CorpusTexts(corpus_dir=tmp_path / "corpus").found()

    def refusal(path: Path) -> str:
        with pytest.raises(CorpusError) as caught:
            read_examples(path, texts)
        return str(caught.value)

    assert "must be a file or a directory" in refusal(tmp_path / "nowhere.jsonl")
    few = write_lines(tmp_path / "few.jsonl", [*OTHERS[:9], *OTHERS[:9]])
    assert "at least 10 different records, got 9" in refusal(few)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(lines.read_text() + '\n{"messages": [{"role": "user", "content": "hm"}]}')
    assert "got one that cannot, number 60 (" in refusal(bad)
    other = tmp_path / "other.jsonl"
    other.write_text('{"q": "What?", "answers": "That."}')
    told = refusal(other)
    assert "name what slap-convert --map " in told
    assert "fields={" not in told
    monkeypatch.setattr(target_set, "MOST_EXAMPLES", 50)
    assert "at most 50 records, got more" in refusal(lines)
    assert "at most 50 records, got more" in refusal(tmp_path / "corpus")
