"""The cost of selection beside the training that it decides on: probe, sketches, composing.

    python -m tools.bench.probe                     # 12 million parameters, on the CPU
    python -m tools.bench.probe --device cuda --hidden 768 --layers 12 --vocabulary 32768

Trains a Llama of random weights on a corpus of its own, with slap at its defaults, and takes the
time of every step apart; then compares sketches of gradients with dense random projections.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from streaming import StreamingDataset
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from slap_stream import LearnabilityProbe, SlapConfig, SlapDataLoader, per_sample_loss
from slap_stream.cli import convert, embed
from slap_stream.cli.command_line import CommandLine, device, ended, whole
from slap_stream.probe.sketch import TensorSketch
from tools.bench.clock import Clock

PROGRAM = "tools.bench.probe"
# The first steps start threads, fill caches and wait for the first fit.
WARMUP_REFRESHES = 2
WORDS_PER_RECORD = (16, 240)
SKETCH_DIM = 512


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    line = CommandLine(prog=PROGRAM, description=__doc__.splitlines()[0] if __doc__ else None)
    line.add_argument(
        "--device", type=device, default="cpu", help="cpu or cuda; cuda trains in bfloat16"
    )
    line.add_argument("--hidden", type=whole(2), default=384)
    line.add_argument("--layers", type=whole(1), default=5)
    line.add_argument("--vocabulary", type=whole(64), default=8_192)
    line.add_argument("--batch-size", type=whole(1), default=32)
    line.add_argument(
        "--refreshes", type=whole(1), default=4, help="probe refreshes that are timed"
    )
    line.add_argument("--threads", type=whole(1), default=torch.get_num_threads())
    arguments = line.parse_args(argv)
    hidden = arguments.hidden
    if hidden % 64 and (hidden > 64 or hidden % 2):
        line.error(
            f"argument --hidden: must be a multiple of 64, or even and below, got {hidden}; heads "
            "have 64 dimensions at most"
        )
    return arguments


class WordCollator:
    """Batches of word numbers: `w17` is token 17."""

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """(batch, tokens) ids, mask and labels; the prompt is not supervised."""
        rows, starts = [], []
        for sample in samples:
            prompt, target = (
                [int(word[1:]) for word in turn["content"].split()] for turn in sample["messages"]
            )
            rows.append(prompt + target)
            starts.append(len(prompt))
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for at, (row, start) in enumerate(zip(rows, starts, strict=True)):
            ids[at, : len(row)] = torch.tensor(row)
            labels[at, start : len(row)] = ids[at, start : len(row)]
            mask[at, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def write_corpus(place: Path, records: int, vocabulary: int) -> Path:
    """Shards and embeddings of random instruction records, lengths spread as in real ones."""
    rng = random.Random(0)
    with (place / "records.jsonl").open("w") as file:
        for _ in range(records):
            low, high = WORDS_PER_RECORD
            words = [
                f"w{min(vocabulary - 1, int(rng.paretovariate(0.4)))}"
                for _ in range(int(low * (high / low) ** rng.random()))
            ]
            cut = len(words) // 3
            messages = [
                {"role": "user", "content": " ".join(words[:cut])},
                {"role": "assistant", "content": " ".join(words[cut:])},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    corpus = place / "corpus"
    made = convert.main([str(place / "records.jsonl"), str(corpus), "--quiet"])
    if made or embed.main([str(corpus), "--quiet"]):
        raise RuntimeError("the corpus must be made, got an error; see above.")
    return corpus


def autocast(device: str) -> AbstractContextManager[Any]:
    """The precision that training and probe run in."""
    return nullcontext() if device == "cpu" else torch.autocast(device, dtype=torch.bfloat16)


def now(device: str) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def selection_cost(arguments: argparse.Namespace, corpus: Path) -> dict[str, float]:
    """Train with slap, and take the time of the steps apart.

    Returns:
        Seconds of training, composing and probing (refreshes are of the probe's), the cost of a
        probed sample and of all selection in units of training, and what the cost model says:
        probed samples per trained one, a forward counted as a third of a step.
    """
    device = arguments.device
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=arguments.vocabulary,
            hidden_size=arguments.hidden,
            intermediate_size=arguments.hidden * 11 // 4,
            num_hidden_layers=arguments.layers,
            num_attention_heads=max(1, arguments.hidden // 64),
            tie_word_embeddings=True,
        )
    ).to(device)
    config = SlapConfig(seed=0)
    loader = SlapDataLoader(
        StreamingDataset(local=str(corpus), batch_size=arguments.batch_size),
        arguments.batch_size,
        embeddings=corpus / "embeddings.zarr",
        config=config,
        collate_fn=WordCollator(),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    probe = LearnabilityProbe(model, loader, optimizer=optimizer)

    def train(batch: dict[str, Tensor]) -> Tensor:
        batch = {name: value.to(device) for name, value in batch.items()}
        with autocast(device):
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses = per_sample_loss(logits, batch["labels"])
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return losses

    def select(ids: Tensor, losses: Tensor) -> None:
        loader.observe(ids, losses)
        with autocast(device):
            probe.step()

    clock = Clock(lambda: now(device))
    training, probing = clock.time("training", train), clock.time("probing", select)
    clock.watch(loader.sampler, "compose", "composing")
    began, last = WARMUP_REFRESHES, WARMUP_REFRESHES + arguments.refreshes
    for step, batch in enumerate(loader, 1):
        probing(batch["sample_id"], training(batch))
        if step == began * config.probe_every:
            clock.seconds.clear()
            before = loader.metrics()["probe_samples"]
        if step == last * config.probe_every:
            break
    probed = loader.metrics()["probe_samples"] - before
    loader.close()
    trained = arguments.refreshes * config.probe_every * arguments.batch_size
    seconds = clock.seconds
    selection = seconds["composing"] + seconds["probing"]
    return {
        "parameters": float(sum(weight.numel() for weight in model.parameters())),
        **{
            f"{name}_seconds": round(seconds[name], 3)
            for name in ("training", "composing", "probing")
        },
        "probed_per_trained": round(probed / trained, 4),
        "probed_sample_in_training_steps": round(
            seconds["probing"] / probed / (seconds["training"] / trained), 4
        ),
        "selection_share": round(selection / seconds["training"], 4),
        "composing_share": round(seconds["composing"] / seconds["training"], 4),
        "modelled_share": round(probed / trained / 3, 4),
    }


def sketch_errors(
    device: str, vocabulary: int, hidden: int, pairs: int = 128, tokens: int = 32
) -> dict[str, float]:
    """Cosines of gradients from sketches, against those from dense Gaussian projections.

    The gradients are sums over tokens of outer products, (p - y) (x) h; in each pair the second
    shares half of its tokens with the first, so that cosines are far from zero.

    Returns:
        Root mean square errors of the cosines, and seconds per gradient.
    """
    draws = torch.Generator().manual_seed(0)
    logits = 3.0 * torch.randn(2 * pairs, tokens, vocabulary, generator=draws)
    left = logits.softmax(2)
    targets = torch.randint(vocabulary, (2 * pairs, tokens, 1), generator=draws)
    left.scatter_add_(2, targets, -torch.ones(targets.shape))
    right = torch.randn(2 * pairs, tokens, hidden, generator=draws)
    left[1::2, : tokens // 2], right[1::2, : tokens // 2] = (
        left[::2, : tokens // 2],
        right[::2, : tokens // 2],
    )
    left, right = left.to(device), right.to(device)
    gradients = torch.einsum("ntv,nth->nvh", left, right).flatten(1)
    exact = _cosines(gradients)
    sketch = TensorSketch(vocabulary, hidden, SKETCH_DIM, seed=0, device=torch.device(device))
    weights = torch.kron(torch.eye(2 * pairs), torch.ones(1, tokens)).to(device)
    copies = [left.flatten(0, 1).clone() for _ in range(2)]
    sketched = sketch.finish(sketch(copies[0], right.flatten(0, 1), weights))
    began = now(device)
    sketch.finish(sketch(copies[1], right.flatten(0, 1), weights))
    middle = now(device)
    dense = torch.zeros(2 * pairs, SKETCH_DIM, device=device)
    # By parts of the vocabulary: the whole projection would not fit where it matters.
    rows = gradients.view(2 * pairs, vocabulary, hidden)
    generator = torch.Generator(device=device).manual_seed(1)
    seconds = 0.0
    for start in range(0, vocabulary, 64):
        part = rows[:, start : start + 64].flatten(1)
        projection = torch.randn(part.shape[1], SKETCH_DIM, generator=generator, device=device)
        at = now(device)
        dense += part @ projection
        seconds += now(device) - at
    return {
        "tensor_sketch_rms_error": round(_rms(_cosines(sketched) - exact), 4),
        "dense_rms_error": round(_rms(_cosines(dense) - exact), 4),
        "mean_cosine": round(float(exact.mean()), 4),
        "tensor_sketch_ms_per_gradient": round(1e3 * (middle - began) / (2 * pairs), 4),
        "dense_ms_per_gradient": round(1e3 * seconds / (2 * pairs), 4),
        "dense_projection_bytes": 4.0 * vocabulary * hidden * SKETCH_DIM,
    }


def _cosines(rows: Tensor) -> Tensor:
    """(n / 2,) cosines of rows 0 and 1, 2 and 3, and so on."""
    return nn.functional.cosine_similarity(rows[::2], rows[1::2])


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    arguments = parse(argv)
    return ended(PROGRAM, lambda: measure(arguments))


def measure(arguments: argparse.Namespace) -> int:
    """Measure and print; the exit status."""
    torch.set_num_threads(arguments.threads)
    steps = (WARMUP_REFRESHES + arguments.refreshes + 1) * SlapConfig().probe_every
    records = int(steps * arguments.batch_size / 0.7)
    with tempfile.TemporaryDirectory() as place:
        corpus = write_corpus(Path(place), records, arguments.vocabulary)
        cost = selection_cost(arguments, corpus)
    errors = sketch_errors(arguments.device, vocabulary=1_024, hidden=128)
    for name, value in (cost | errors).items():
        print(f"{value:>16,.4f}  {name}")
    print(json.dumps(cost | errors))
    return 0


if __name__ == "__main__":
    sys.exit(main())
