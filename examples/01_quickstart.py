"""First light: train a small language model twice, on uniform batches and on SLAP's.

    python examples/01_quickstart.py                                # no download, no argument
    python examples/01_quickstart.py --corpus my_data.jsonl.gz      # the same on your data

The corpus is made of the docstrings of this Python installation. Both runs start from the same
weights and train on the same number of samples, each with its own fully decayed learning rate. What
comes out is reported as it is, also when uniform batches win. Needs `pip install ".[examples]"`.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quickstart_data import Record, docstring_records, read_records, split, train_tokenizer
from quickstart_figure import Curve, draw
from quickstart_report import Run, kinds_of, report, strata_of
from streaming import StreamingDataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slap_stream import (
    EmbeddingStore,
    LearnabilityProbe,
    SlapConfig,
    SlapDataLoader,
    per_sample_loss,
)
from slap_stream.cli import convert, embed
from slap_stream.cli.command_line import CommandLine, ended, real, share, to_write, whole
from slap_stream.errors import CorpusError
from slap_stream.shards.index import corpus_size
from slap_stream.shards.reader import iter_corpus
from slap_stream.text.chat import encode
from slap_stream.text.collate import ChatCollator

BATCH_SIZE = 16
EPOCHS = 4
NUM_HELDOUT = 400
EVALUATIONS = 8
LEARNING_RATE = 3e-3
# Tokens and padding that each run trains on, about; it sets the size of the training set. With
# this the whole script takes less than four minutes on two cores.
TOKENS_PER_RUN = 600_000
# Says that a directory is a quickstart's own and may be overwritten.
MARKER = ".quickstart"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def command(tool: Any, *arguments: str | Path) -> None:
    """Run a command-line tool of slap_stream in this process, and show it as one would type it."""
    name = tool.__name__.rsplit(".", 1)[-1]
    print(f"$ slap-{name} {' '.join(map(str, arguments))}", flush=True)
    status = tool.main([str(argument) for argument in arguments])
    if status:
        sys.exit(status)


def new_model(tokenizer: PreTrainedTokenizerFast, max_tokens: int, seed: int) -> LlamaForCausalLM:
    """A Llama of about a million parameters; the same weights for the same seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=max_tokens,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).to(DEVICE)


def forward(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(batch,) mean loss over the supervised tokens of each sample."""
    batch = {name: value.to(DEVICE) for name, value in batch.items()}
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return per_sample_loss(logits, batch["labels"])


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, batches: list[dict[str, torch.Tensor]]) -> np.ndarray:
    """(heldout,) loss of each held-out record."""
    model.eval()
    losses = torch.cat([forward(model, batch) for batch in batches])
    model.train()
    return losses.double().cpu().numpy()


def train(
    policy: str,
    corpus: Path,
    tokenizer: PreTrainedTokenizerFast,
    heldout: list[dict[str, torch.Tensor]],
    *,
    max_tokens: int,
    keep: float,
    seed: int,
) -> Run:
    """Train a fresh model on the batches of one policy; this is what your own loop looks like."""
    dataset = StreamingDataset(local=str(corpus), batch_size=BATCH_SIZE)
    loader = SlapDataLoader(
        dataset,
        batch_size=BATCH_SIZE,
        embeddings=corpus / "embeddings.zarr",
        config=SlapConfig(policy=policy, keep=keep, seed=seed),
        collate_fn=ChatCollator(tokenizer),
    )
    model = new_model(tokenizer, max_tokens, seed)
    steps = EPOCHS * len(loader)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    due = {round(steps * part / EVALUATIONS) for part in range(1, EVALUATIONS + 1)}
    run = Run(samples=[0], losses=[float(evaluate(model, heldout).mean())])
    strata = []
    step, resumed = 0, time.perf_counter()
    # Uniform batches need no answers from the model, and so they do not pay for any.
    probe = LearnabilityProbe(model, loader, optimizer=optimizer) if policy != "uniform" else None
    for _ in range(EPOCHS):
        for batch in loader:
            losses = forward(model, batch)
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            loader.observe(batch["sample_id"], losses)
            if probe is not None:
                probe.step()
            step += 1
            run.kept += batch["sample_id"].tolist()
            run.tokens += int((batch["labels"][:, 1:] != -100).sum())
            if step in due:
                run.seconds += time.perf_counter() - resumed
                run.final = evaluate(model, heldout)
                run.samples.append(step * BATCH_SIZE)
                run.losses.append(float(run.final.mean()))
                print(f"  {policy:8} step {step:4}/{steps}  held-out loss {run.losses[-1]:.3f}")
                resumed = time.perf_counter()
        strata.append([loader.sampler.offered_by_stratum, loader.sampler.trained_by_stratum])
    run.strata = np.sum(strata, axis=0)
    run.metrics = loader.metrics()
    return run


def rate(step: int, steps: int) -> float:
    """Share of the learning rate: a short warm-up, then a cosine down to zero within the run."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def size(messages: list[dict[str, str]]) -> float:
    """Tokens of these messages, roughly: with so small a vocabulary three characters make one."""
    return sum(len(message["content"]) for message in messages) / 3


def answer_start(record: Record) -> float:
    """Tokens before the first answer, roughly; a record cut before that teaches nothing."""
    roles = [message["role"] for message in record["messages"]]
    return size(record["messages"][: roles.index("assistant")]) if "assistant" in roles else 0.0


def heldout_batches(
    records: list[Record], tokenizer: PreTrainedTokenizerFast, max_tokens: int
) -> list[dict[str, torch.Tensor]]:
    """Held-out records as batches of similar length; records cut before the answer are left out."""
    samples = []
    for record in records:
        encoded = encode(tokenizer, record["messages"], max_length=max_tokens)
        if any(encoded.supervised[1:]):
            samples.append({"input_ids": encoded.input_ids, "supervised": encoded.supervised})
    samples.sort(key=lambda sample: len(sample["input_ids"]))
    collate = ChatCollator(tokenizer)
    return [collate(samples[start : start + 64]) for start in range(0, len(samples), 64)]


def main() -> int:
    """Read the command line and run; nothing of the user's is ever overwritten."""
    line = CommandLine(description=__doc__.splitlines()[0] if __doc__ else None)
    line.add_argument("--corpus", type=Path, help="JSONL of your own; default: docstrings")
    line.add_argument("--keep", type=share, default=0.7, help="share of candidates trained on")
    line.add_argument("--seed", type=whole(0), default=0)
    line.add_argument("--scale", type=real(0.01), default=1.0, help="1: under 4 minutes on 2 cores")
    line.add_argument("--out", type=to_write, default=Path("runs/quickstart"))
    arguments = line.parse_args()
    out = arguments.out
    if out.exists() and not (out / MARKER).exists():
        line.error(f"--out must be new or of an earlier quickstart, got {out}; it is overwritten")
    if arguments.corpus is not None and out.resolve() in arguments.corpus.resolve().parents:
        line.error(f"--corpus must not lie in --out, got {arguments.corpus}; --out is overwritten")
    run(arguments)
    return 0


def run(arguments: Any) -> None:
    """Corpus -> tokenizer -> shards -> embeddings -> two runs -> figure."""
    out: Path = arguments.out
    # For a model this small more threads bring little, and on a busy machine they wait for another.
    torch.set_num_threads(1)
    start = time.perf_counter()

    def stage(name: str) -> None:
        print(f"[{time.perf_counter() - start:5.1f} s] {name}", flush=True)

    if arguments.corpus is None:
        count = 1_000 + int(9_000 * arguments.scale)
        stage("Reading the docstrings of this Python installation")
        name, records = "Docstrings of this Python", docstring_records(count, arguments.seed)
    else:
        stage(f"Reading {arguments.corpus}")
        name, records = arguments.corpus.name, read_records(arguments.corpus)
    if not records:
        raise CorpusError(f"--corpus must hold records to train on, got none in {name}.")
    lengths = [size(record["messages"]) for record in records]
    max_tokens = int(np.clip(np.quantile(lengths, 0.8), 32, 256))
    records = [record for record in records if answer_start(record) < max_tokens]
    trained = TOKENS_PER_RUN * arguments.scale / max_tokens
    train_records, heldout_records = split(
        records,
        num_train=int(trained / (arguments.keep * EPOCHS)),
        num_heldout=max(64, int(NUM_HELDOUT * min(1.0, arguments.scale))),
        seed=arguments.seed,
    )

    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARKER).touch()
    with (out / "train.jsonl").open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in train_records)
    stage(f"Training a tokenizer on {len(train_records):,} records")
    tokenizer = train_tokenizer(train_records, out / "tokenizer")
    stage("Making shards and embeddings")
    corpus = out / "corpus"
    command(convert, out / "train.jsonl", corpus, "--tokenizer", out / "tokenizer",
            "--max-length", max_tokens, "--shard-bytes", 100_000, "--quiet")  # fmt: skip
    command(embed, corpus, "--quiet")

    heldout = heldout_batches(heldout_records, tokenizer, max_tokens)
    runs = {}
    for policy in ("uniform", "slap"):
        stage(f"Training on {policy} batches")
        runs[policy] = train(
            policy,
            corpus,
            tokenizer,
            heldout,
            max_tokens=max_tokens,
            keep=arguments.keep,
            seed=arguments.seed,
        )
    num_samples = corpus_size(corpus)
    results = report(runs, offered=EPOCHS * num_samples)
    (out / "results.json").write_text(json.dumps(results, indent=2))
    source_names = EmbeddingStore(corpus / "embeddings.zarr").source_names
    by_id = {record["id"]: record for record in train_records}
    stored = [by_id[sample["id"]] for sample in iter_corpus(corpus, 0, num_samples)]
    draw(
        out / "quickstart.png",
        title=f"{name}: {runs['slap'].samples[-1]:,} samples trained on, "
        f"of {EPOCHS * num_samples:,} candidates",
        verdict=f"{results['verdict']} (paired over {len(runs['slap'].final)} records, one seed)",
        keep=runs["slap"].samples[-1] / (EPOCHS * num_samples),
        curves=[
            Curve(name=policy, samples=run.samples, losses=run.losses)
            for policy, run in runs.items()
        ],
        strata=strata_of(runs["slap"], source_names),
        kinds=kinds_of(stored, runs, EPOCHS),
    )
    stage(f"Done: {out / 'quickstart.png'}, {out / 'results.json'}")


if __name__ == "__main__":
    sys.exit(ended(Path(__file__).name, main))
