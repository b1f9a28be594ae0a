"""Vectors and columns say what they promise about texts."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.metrics import roc_auc_score
from transformers import (
    BertConfig,
    BertModel,
    LlamaForCausalLM,
    T5Config,
    T5Model,
)

from slap_stream.embeddings.encoders import HashingEncoder, HFEncoder, open_encoder
from slap_stream.embeddings.features import (
    FEATURE_NAMES,
    NUM_BUCKETS,
    TOKEN_PATTERN,
    HashedTfidf,
    feature_columns,
    words_and_pairs,
)
from slap_stream.embeddings.pretrained import pad, token_batches
from slap_stream.embeddings.reference import ReferenceLoss
from slap_stream.errors import ConfigError
from slap_stream.text.sample import TextSample, from_messages, halves
from tests.helpers.embed_models import save_llama, save_tokenizer
from tests.helpers.embed_samples import WORDS, pair, question

# HashingEncoder(8) of one sample: stores embedded by an earlier version must stay comparable.
PINNED = [-0.146591, 0.253902, 0.507805, 0.400493, 0.654395, -0.107312, -0.185869, -0.146591]


@pytest.fixture(scope="module")
def questions() -> list[TextSample]:
    return [question(number) for number in range(300)]


@pytest.fixture(scope="module")
def tfidf(questions: list[TextSample]) -> HashedTfidf:
    fitted = HashedTfidf()
    fitted.fit(questions)
    return fitted


HASHING = HashingEncoder()


def encode(samples: list[TextSample], tfidf: HashedTfidf) -> np.ndarray:
    vectors, columns = HASHING.encode(samples, tfidf.transform(samples))
    assert columns.shape == (len(samples), 0)
    return vectors


def test_hashed_vectors_are_unit_rows_that_do_not_depend_on_the_batch(
    questions: list[TextSample], tfidf: HashedTfidf
) -> None:
    together = encode(questions, tfidf)
    alone = np.concatenate([encode([sample], tfidf) for sample in questions[:5]])
    assert together.shape == (300, 384)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(together[:5], alone, atol=1e-6)


def test_the_projection_keeps_cosines_within_its_promise(
    questions: list[TextSample], tfidf: HashedTfidf
) -> None:
    pairs = tfidf.transform(questions)
    summed = pairs.prompt + pairs.target
    exact = (summed @ summed.T).toarray()
    norm = np.sqrt(np.diag(exact))
    exact /= np.outer(norm, norm)
    vectors = encode(questions, tfidf)
    error = (vectors @ vectors.T - exact)[np.triu_indices(300, 1)]
    # Fixed hash: no false alarms.
    assert np.sqrt(np.mean(error**2)) < 1.2 / np.sqrt(384)
    assert abs(error.mean()) < 0.02


def test_near_copies_stand_out_from_every_other_sample(
    questions: list[TextSample], tfidf: HashedTfidf
) -> None:
    edited = [
        pair(sample.prompt.replace("tell", "say", 1), sample.target.replace("well", "oh", 1))
        for sample in questions
    ]
    vectors = encode(questions, tfidf)
    to_copy = np.einsum("nd,nd->n", encode(edited, tfidf), vectors)
    others = vectors @ vectors.T
    np.fill_diagonal(others, -1)
    assert to_copy.min() > 0.8
    marks = np.r_[np.ones(300), np.zeros(300)]
    assert roc_auc_score(marks, np.r_[to_copy, others.max(axis=1)]) > 0.95


def test_prompt_and_target_weigh_the_same_however_long(tfidf: HashedTfidf) -> None:
    long = " ".join(WORDS * 20)
    same, other = encode([pair(long, "yes indeed"), pair(long, "no never")], tfidf)
    assert 0.3 < same @ other < 0.7


def test_shuffled_targets_are_told_by_the_columns(
    questions: list[TextSample], tfidf: HashedTfidf
) -> None:
    swapped = [
        pair(sample.prompt, other.target)
        for sample, other in zip(questions, questions[1:] + questions[:1], strict=True)
    ]
    marks = np.r_[np.zeros(300), np.ones(300)]
    both = [feature_columns(each, tfidf.transform(each)) for each in (questions, swapped)]
    columns = np.concatenate(both)
    cosine = columns[:, FEATURE_NAMES.index("prompt_target_cosine")]
    packed = columns[:, FEATURE_NAMES.index("target_given_prompt")]
    assert roc_auc_score(marks, -cosine) > 0.8
    assert roc_auc_score(marks, packed) > 0.7


def test_columns_mean_what_their_names_say(tfidf: HashedTfidf) -> None:
    text = " ".join(f"{word} {place}" for place, word in enumerate(WORDS))
    samples = [
        pair(text, text),
        pair("something else", text),
        pair("something else", "ab " * 100),
        pair("something else", "zyzzyva"),
    ]
    columns = feature_columns(samples, tfidf.transform(samples))
    named = {name: columns[:, place] for place, name in enumerate(FEATURE_NAMES)}
    assert named["log_length"][0] == pytest.approx(np.log(-(-2 * len(text) // 4)))
    assert named["target_share"][0] == pytest.approx(0.5)
    assert named["prompt_target_cosine"][0] == pytest.approx(1, abs=1e-5)
    assert named["prompt_target_cosine"][1] == 0
    assert named["target_given_prompt"][0] < 0.05 < named["target_given_prompt"][1]
    assert named["target_compression"][2] < 0.1 < named["target_compression"][1]
    assert named["target_rarity"][3] > named["target_rarity"][1]


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(max_size=80), target=st.text(max_size=80))
def test_any_text_gives_finite_columns_and_a_unit_or_zero_vector(
    tfidf: HashedTfidf, prompt: str, target: str
) -> None:
    samples = [
        pair(prompt, target),
        from_messages([{"role": "text", "content": prompt + target}], None),
    ]
    columns = feature_columns(samples, tfidf.transform(samples))
    assert np.isfinite(columns).all()
    assert (columns[:, 1:5] >= 0).all()
    assert np.isfinite(columns.astype(np.float16)).all()
    for norm in np.linalg.norm(encode(samples, tfidf), axis=1):
        assert norm == pytest.approx(0, abs=1e-6) or norm == pytest.approx(1, abs=1e-4)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_halves_are_the_text_cut_near_its_middle(text: str) -> None:
    first, second = halves(text)
    assert first + second == text
    assert len(text) // 4 <= len(first) <= (len(text) + 1) // 2


def test_scripts_without_spaces_are_told_apart(tfidf: HashedTfidf) -> None:
    cat, cats, tea = encode(
        [pair("", text) for text in ("猫は魚が好きです", "猫は肉が好きです", "お茶を飲みますか")],
        tfidf,
    )
    assert cat @ cats > 0.4 > cat @ tea + 0.2


def test_hashing_is_the_same_in_every_process(tfidf: HashedTfidf) -> None:
    encoder = HashingEncoder(64)
    copy = pickle.loads(pickle.dumps(encoder))
    assert len(pickle.dumps(encoder)) < 200
    sample = [pair("river stone", "lantern")]
    np.testing.assert_array_equal(
        encoder.encode(sample, tfidf.transform(sample))[0],
        copy.encode(sample, pickle.loads(pickle.dumps(tfidf)).transform(sample))[0],
    )
    vectors, _ = HashingEncoder(8).encode(sample, HashedTfidf().transform(sample))
    np.testing.assert_allclose(vectors[0], PINNED, atol=1e-4)


def test_frequencies_are_counted_on_samples_that_come_one_by_one() -> None:
    fitted = HashedTfidf()
    fitted.fit(pair("river", "stone") for _ in range(3_000))
    assert fitted.idf.shape == (NUM_BUCKETS,)
    assert fitted.idf.min() == pytest.approx(1)


@pytest.mark.parametrize("name", ["bert", "hf:", ""])
def test_an_unknown_encoder_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="encoder must be one of hashing, hf:PATH"):
        open_encoder(name)


def test_bad_dimensions_and_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dim must be a whole number >= 8, got 4"):
        open_encoder("hashing", dim=4)
    with pytest.raises(ConfigError, match="dim must be None for hf:x, got 8"):
        open_encoder("hf:x", dim=8)
    with pytest.raises(ConfigError, match="model path must hold a Hugging Face model"):
        open_encoder(f"hf:{tmp_path}")


@pytest.fixture(scope="module")
def bert_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(path)
    save_tokenizer(path, WORDS)
    return path


def test_a_hugging_face_encoder_pools_what_the_mask_shows(bert_path: Path) -> None:
    encoder = HFEncoder(str(bert_path), "cpu")
    samples = [pair("river stone", "lantern"), pair(" ".join(WORDS * 3), "copper"), pair("", "  ")]
    vectors, columns = encoder.encode(samples, HashedTfidf().transform(samples))
    assert encoder.dim == 16
    assert encoder.feature_names == ("prompt_target_similarity",)
    assert vectors.shape == (3, 16)
    assert columns.shape == (3, 1)
    alone, _ = encoder.encode(samples[:1], HashedTfidf().transform(samples[:1]))
    np.testing.assert_allclose(vectors[:1], alone, atol=1e-5)
    np.testing.assert_array_equal(vectors[2], 0)
    model = BertModel.from_pretrained(bert_path, add_pooling_layer=False).eval()
    means = []
    for ids in ([2, 3], [4]):
        with torch.no_grad():
            mean = model(input_ids=torch.tensor([ids])).last_hidden_state.mean(1)[0]
        means.append(mean / mean.norm())
    expected = means[0] + means[1]
    np.testing.assert_allclose(vectors[0], expected / expected.norm(), atol=1e-5)
    assert columns[0, 0] == pytest.approx(float(means[0] @ means[1]), abs=1e-5)


def test_the_version_of_a_model_follows_its_weights(bert_path: Path, tmp_path: Path) -> None:
    before = HFEncoder(str(bert_path), "cpu").version
    assert before == HFEncoder(str(bert_path), "cpu").version
    model = BertModel.from_pretrained(bert_path, add_pooling_layer=False)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, WORDS)
    assert HFEncoder(str(tmp_path), "cpu").version != before


def test_the_encoder_half_of_an_encoder_decoder_is_used(tmp_path: Path) -> None:
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5Model(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, WORDS)
    encoder = HFEncoder(str(tmp_path), "cpu")
    samples = [pair("river stone", "lantern")]
    vectors, _ = encoder.encode(samples, HashedTfidf().transform(samples))
    assert np.linalg.norm(vectors) == pytest.approx(1, abs=1e-4)


@pytest.fixture(scope="module")
def llama_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_llama(path)
    return path


def tokens(ids: list[int], supervised: list[bool]) -> TextSample:
    return TextSample(
        prompt="",
        target="x",
        length=len(ids),
        input_ids=np.array(ids, dtype=np.int32),
        supervised=np.array(supervised),
    )


def test_the_reference_loss_is_the_models_own(llama_path: Path) -> None:
    reference = ReferenceLoss(str(llama_path), "cpu")
    samples = [
        tokens([2, 3, 4, 5], [False, False, True, True]),
        tokens([9, 8, 7, 6, 5, 4, 3, 2], [True] * 8),
        tokens([5, 6], [False, False]),
        tokens([5], [True]),
        tokens([7] * 40, [False] * 23 + [True] * 17),
    ]
    losses = reference.columns(samples)
    assert reference.feature_names == ("reference_loss",)
    assert losses.shape == (5, 1)
    model = LlamaForCausalLM.from_pretrained(llama_path).eval()
    for row in (0, 1, 4):
        ids = torch.tensor(samples[row].input_ids)[None, :24].long()
        marks = torch.tensor(samples[row].supervised)[None, :24]
        labels = ids.masked_fill(~marks, -100)
        with torch.no_grad():
            expected = model(input_ids=ids, labels=labels).loss.item()
        assert losses[row, 0] == pytest.approx(expected, rel=1e-4)
    assert losses[2, 0] == losses[3, 0] == 0


def test_the_reference_loss_reads_messages_and_plain_text(llama_path: Path) -> None:
    reference = ReferenceLoss(str(llama_path), "cpu")
    plain = from_messages([{"role": "text", "content": "river stone lantern"}], None)
    chat = pair("river", "stone")
    losses = reference.columns([plain, chat])
    assert np.isfinite(losses).all()
    assert (losses > 0).all()
    with pytest.raises(ConfigError, match="sample must have messages or input_ids"):
        reference.columns([TextSample(prompt="", target="x", length=1)])


def test_a_reference_model_of_another_vocabulary_is_refused(
    llama_path: Path, tmp_path: Path
) -> None:
    save_tokenizer(tmp_path, WORDS[:5])
    with pytest.raises(ConfigError, match="reference model must share the corpus's vocabulary"):
        ReferenceLoss(str(llama_path), "cpu", tokenizer=str(tmp_path))
    ReferenceLoss(str(llama_path), "cpu", tokenizer=str(llama_path))


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 50), max_size=40), budget=st.integers(1, 200))
def test_token_batches_hold_every_position_once_within_the_budget(
    lengths: list[int], budget: int
) -> None:
    batches = [batch.tolist() for batch in token_batches(np.array(lengths, dtype=int), budget)]
    assert sorted(at for batch in batches for at in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[at] for at in batch) * len(batch) <= budget


def test_padding_is_zeros_on_the_right_that_the_mask_hides() -> None:
    ids, mask = pad([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


@given(
    st.lists(st.sampled_from(["a", "Bc", "É1", "คำ", "世界", "_x", "?", " ", "\n", "İ"])).map(
        "".join
    )
)
def test_words_and_pairs_are_those_of_scikit_learn(text: str) -> None:
    own = HashingVectorizer(ngram_range=(1, 2), token_pattern=TOKEN_PATTERN).build_analyzer()
    assert words_and_pairs(text) == own(text)
