"""What a model that reads a corpus once holds against a sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from slap_stream.embeddings import judge as judging
from slap_stream.embeddings.judge import Judge
from slap_stream.errors import ConfigError
from slap_stream.text.sample import TextSample
from tests.helpers.embed_models import save_llama, save_tokenizer
from tests.helpers.embed_samples import WORDS
from tests.strategies import Array

NUM, LOW, HIGH = 400, 10, 40


def sample_of(ids: list[int], prompt: int, source: str = "a") -> TextSample:
    """Token ids, of which the first are the prompt; equal texts are equal samples."""
    marks = np.arange(len(ids)) >= prompt
    array = np.array(ids, np.int32)
    text = " ".join(map(str, ids))
    return TextSample(
        prompt=text[:9],
        target=text,
        length=len(ids),
        source=source,
        input_ids=array,
        supervised=marks,
    )


def counting(rng: np.random.Generator, length: int) -> list[int]:
    """Token ids that count upwards from somewhere."""
    start = int(rng.integers(LOW, HIGH))
    return [LOW + (start + step) % (HIGH - LOW) for step in range(length)]


def corpus(share: float) -> tuple[list[TextSample], Array]:
    """Targets that go on counting, and a share that says anything."""
    rng = np.random.default_rng(1)
    spoilt = rng.random(NUM) < share
    samples = []
    for wrong in spoilt:
        ids = counting(rng, int(rng.integers(12, 22)))
        if wrong:
            ids[4:] = rng.integers(LOW, HIGH, len(ids) - 4).tolist()
        samples.append(sample_of(ids, 4))
    return samples, spoilt


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt to count, though not always."""
    path = tmp_path_factory.mktemp("counter")
    save_llama(path)
    model = LlamaForCausalLM.from_pretrained(path)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rng = np.random.default_rng(0)
    for _ in range(60):
        ids = torch.tensor([counting(rng, 20) for _ in range(32)])
        stray = torch.rand(ids.shape) < 0.1
        ids[stray] = torch.randint(LOW, HIGH, (int(stray.sum()),))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    return path


def test_targets_that_say_anything_are_found(counter: Path) -> None:
    samples, spoilt = corpus(0.15)
    judge = Judge(str(counter), "cpu", source_names=["a"])
    judge.fit(samples)
    losses, probability = judge.judge(samples)
    assert losses[spoilt].mean() > losses[~spoilt].mean() + 1
    assert probability[spoilt].mean() > 0.7
    assert probability[~spoilt].mean() < 0.03


def test_nothing_is_held_against_a_clean_corpus(counter: Path) -> None:
    samples, _ = corpus(0.0)
    judge = Judge(str(counter), "cpu")
    judge.fit(samples)
    assert judge.judge(samples)[1].mean() < 0.03


def test_the_same_text_is_read_once(counter: Path) -> None:
    samples, _ = corpus(0.15)
    judge = Judge(str(counter), "cpu")
    judge.fit(samples)
    assert judge.tokens == sum(sample.length for sample in samples)
    before, _ = judge.judge(samples)
    assert judge.tokens == sum(sample.length for sample in samples)
    fresh = Judge(str(counter), "cpu")
    np.testing.assert_allclose(before, fresh.judge(samples)[0], rtol=1e-3)


def test_only_the_end_of_a_prompt_and_the_beginning_of_a_target_are_read(
    counter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "PROMPT_TOKENS", 3)
    monkeypatch.setattr(judging, "TARGET_TOKENS", 5)
    ids = counting(np.random.default_rng(2), 22)
    judge = Judge(str(counter), "cpu")
    (loss,), _ = judge.judge([sample_of(ids, 8)])
    assert judge.tokens == 8
    # Neither what comes before nor what comes after changes anything.
    (same,), _ = judge.judge([sample_of([LOW] * 5 + ids[5:13] + [LOW] * 3, 8)])
    assert loss == pytest.approx(same, rel=1e-5)


def test_a_target_beyond_the_window_is_read_all_the_same(counter: Path) -> None:
    judge = Judge(str(counter), "cpu")
    ids = counting(np.random.default_rng(3), 100)
    (loss,), _ = judge.judge([sample_of(ids, 92)])
    # Half of the model's 24 tokens before it, and its eight.
    assert judge.tokens == 12 + 8
    assert loss > 0


def test_a_sample_without_a_target_is_left_alone(counter: Path) -> None:
    samples, _ = corpus(0.15)
    judge = Judge(str(counter), "cpu")
    judge.fit([*samples, sample_of([11, 12, 13], 3)])
    losses, probability = judge.judge([sample_of([14, 15, 16], 3)])
    assert losses[0] == probability[0] == 0.0


def test_a_model_of_another_vocabulary_is_refused(counter: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, WORDS[:5])
    with pytest.raises(ConfigError, match="judge model must share the corpus's vocabulary"):
        Judge(str(counter), "cpu", tokenizer=str(tmp_path))
