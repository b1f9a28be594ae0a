"""The main job, whole: corpus -> shards -> embeddings -> a model trained on composed batches."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streaming import StreamingDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slap_stream import LearnabilityProbe, SlapDataLoader, per_sample_loss
from slap_stream.cli import convert, embed
from slap_stream.errors import ConfigError
from slap_stream.text.collate import ChatCollator
from tests.laws import as_json, config_of

BATCH = 8
# Of 206 candidates 0.7 are kept: 18 batches an epoch. One cut lies between the two epochs.
CUTS = (1, 11, 18, 22)
VERBS = ["adds", "removes", "sorts", "counts", "joins", "splits"]
NOUNS = ["lists", "trees", "names", "files", "rows", "keys"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; nothing to train."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|end|>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")


def record(number: int) -> dict[str, Any]:
    """An instruction record."""
    verb, noun = VERBS[number % 6], NOUNS[number // 6 % 6]
    return {
        "source": f"s{number % 3}",
        "messages": [
            {"role": "user", "content": f"What does f{number} do?"},
            {"role": "assistant", "content": f"f{number} {verb} {noun}."},
        ],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted and embedded corpus with a tokenizer and a tiny model beside it."""
    path = tmp_path_factory.mktemp("training")
    with (path / "data.jsonl").open("w") as file:
        file.writelines(json.dumps(record(number)) + "\n" for number in range(206))
    corpus = str(path / "corpus")
    tools = [str(path / "data.jsonl"), corpus, "--shard-bytes", "6000", "--quiet"]
    assert convert.main(tools) == 0
    assert embed.main([corpus, "--dim", "32", "--quiet"]) == 0
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(path / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(path / "model")
    return path


class Job:
    """A training job that can be saved and loaded, as users write them."""

    def __init__(self, folder: Path, **options: Any) -> None:
        collate = ChatCollator(byte_tokenizer(), max_length=96)
        self.loader = SlapDataLoader(
            StreamingDataset(local=str(folder / "corpus"), batch_size=BATCH),
            BATCH,
            embeddings=folder / "corpus" / "embeddings.zarr",
            config=config_of(num_lanes=2, lookahead=4, warmup_losses=48),
            collate_fn=collate,
            **options,
        )
        self.model = LlamaForCausalLM.from_pretrained(folder / "model")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        self.probe = LearnabilityProbe(self.model, self.loader, optimizer=self.optimizer)

    def steps(self) -> Iterator[tuple[list[int], float]]:
        """Train for ever; sample ids and mean loss of each step."""
        while True:
            for batch in self.loader:
                output = self.model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
                )
                losses = per_sample_loss(output.logits, batch["labels"])
                losses.mean().backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.loader.observe(batch["sample_id"], losses)
                self.probe.step()
                yield batch["sample_id"].tolist(), losses.mean().item()

    def state_dict(self) -> dict[str, Any]:
        """Everything, with the loader's part through JSON."""
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "loader": as_json(self.loader.state_dict()),
            }
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loader.load_state_dict(state["loader"])


class Unbroken:
    """Two epochs in one go: what was trained on, and what was saved on the way."""

    def __init__(self, job: Job) -> None:
        steps, epoch = job.steps(), len(job.loader)
        self.done: list[tuple[list[int], float]] = []
        self.states: dict[int, dict[str, Any]] = {}
        for cut in CUTS:
            self.done += islice(steps, cut - len(self.done))
            self.states[cut] = job.state_dict()
            if cut == epoch:
                self.metrics = job.loader.metrics()
        self.done += islice(steps, 2 * epoch - len(self.done))


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> Unbroken:
    return Unbroken(Job(folder))


def test_the_model_learns_and_the_probe_pays_within_its_budget(unbroken: Unbroken) -> None:
    first, last = unbroken.done[0][1], unbroken.done[-1][1]
    assert last < first - 1.0
    metrics = unbroken.metrics
    assert metrics["fitted"] == 1
    assert 0 < metrics["probe_samples"] <= 0.1 * metrics["offered"] + 2
    assert metrics["probe_moment_from_optimizer"] == 1
    assert metrics["nonfinite"] == 0
    assert all(isinstance(value, float) for value in metrics.values())


@pytest.mark.parametrize("cut", CUTS)
def test_training_with_a_probe_resumes_exactly(folder: Path, unbroken: Unbroken, cut: int) -> None:
    again, rest = Job(folder), unbroken.done[cut:]
    again.load_state_dict(unbroken.states[cut])
    tail = list(islice(again.steps(), len(rest)))
    assert [ids for ids, _ in tail] == [ids for ids, _ in rest]
    np.testing.assert_allclose([loss for _, loss in tail], [loss for _, loss in rest])


def test_a_probe_attached_after_loading_takes_its_part_of_the_state(folder: Path) -> None:
    job = Job(folder)
    list(islice(job.steps(), 9))
    state = job.loader.state_dict()
    other = Job(folder)
    fresh = SlapDataLoader(
        StreamingDataset(local=str(folder / "corpus"), batch_size=BATCH),
        BATCH,
        embeddings=folder / "corpus" / "embeddings.zarr",
        config=other.loader.config,
        collate_fn=ChatCollator(byte_tokenizer(), max_length=96),
    )
    fresh.load_state_dict(state)
    assert as_json(fresh.state_dict()) == as_json(state)
    probe = LearnabilityProbe(job.model, fresh, optimizer=job.optimizer)
    assert probe.state_dict()["step"] == 9


def test_a_second_probe_is_refused_and_the_first_goes_on(folder: Path) -> None:
    job = Job(folder)
    with pytest.raises(ConfigError, match="loader must have one probe, got a second one; step"):
        LearnabilityProbe(job.model, job.loader)
    assert job.probe.state_dict()["step"] == 0
    list(islice(job.steps(), 3))
    assert job.loader.metrics()["probe_steps"] == 3


def test_a_batch_holds_what_the_readme_says(folder: Path) -> None:
    batch = next(iter(Job(folder, num_workers=1).loader))
    assert set(batch) == {"input_ids", "attention_mask", "labels", "sample_id"}
    assert batch["sample_id"].shape == (BATCH,)
    assert batch["sample_id"].dtype == torch.int64
