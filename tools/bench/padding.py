"""What padding costs: its share with and without grouping by length, and tokens/s of a real model.

    python -m tools.bench.padding --model path/to/model chats.jsonl.gz more.parquet

First the share of padding that a loader measures, for several batch sizes and accumulations. Then
training steps (forward and backward) on the same samples: padded as composed, dealt by length, and
without padding, in turns; a speed is a ratio within one round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from streaming import StreamingDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from slap_stream import ChatCollator, SlapConfig, SlapDataLoader, convert, embed
from slap_stream.cli.command_line import CommandLine, device, ended, whole

PROGRAM = "tools.bench.padding"
# Settings of the three arms: is grouping on, and what becomes of a batch.
ARMS: dict[str, tuple[bool, Any]] = {
    "padded": (False, None),
    "grouped": (True, None),
    "padding-free": (False, "padding_free"),
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    line = CommandLine(prog=PROGRAM, description=__doc__.splitlines()[0] if __doc__ else None)
    line.add_argument("inputs", nargs="+", help="records, as for slap-convert")
    line.add_argument("--model", required=True, help="directory of a model and its tokenizer")
    line.add_argument("--device", type=device, default="cpu", help="cpu or cuda")
    line.add_argument("--attention", default="sdpa", help="attn_implementation of the model")
    line.add_argument("--batch-size", type=whole(1), default=8, help="of the training steps")
    line.add_argument("--accumulation", type=whole(1), default=8, help="of the training steps")
    line.add_argument("--steps", type=whole(0), default=1, help="optimizer steps in a round")
    line.add_argument("--rounds", type=whole(1), default=3)
    line.add_argument("--max-length", type=whole(2), default=1024)
    line.add_argument("--samples", type=whole(1), default=2_000, help="seen for a share")
    return line.parse_args(argv)


def loader_of(
    corpus: Path, collate: ChatCollator, *, batch_size: int, accumulation: int
) -> SlapDataLoader:
    """Uniform batches: what is selected has no part in this."""
    return SlapDataLoader(
        StreamingDataset(local=str(corpus), batch_size=batch_size),
        embeddings=corpus / "embeddings.zarr",
        config=SlapConfig(policy="uniform", seed=1, length_grouping=accumulation),
        collate_fn=collate,
    )


def padding_shares(corpus: Path, collate: ChatCollator, samples: int) -> list[dict[str, Any]]:
    """The share of padding for several batch sizes and accumulations."""
    found = []
    for batch_size in (4, 8, 16):
        for accumulation in (1, 4, 8, 16):
            loader = loader_of(corpus, collate, batch_size=batch_size, accumulation=accumulation)
            for _ in islice(loader, samples // batch_size):
                pass
            share = round(loader.metrics()["padding_share"], 4)
            loader.close()
            print(
                f"batches of {batch_size}, {accumulation} a step: {share:.1%} padding", flush=True
            )
            found.append(
                {"batch_size": batch_size, "accumulation": accumulation, "padding_share": share}
            )
    return found


def seconds_of(model: Any, batches: Sequence[Any], where: str) -> tuple[float, float]:
    """Seconds that forward and backward of these batches take, and those of the CPU's cores."""
    began, cores_began = time.perf_counter(), time.process_time()
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "sample_id"}
        moved = {k: v.to(where) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        model(**moved).loss.backward()
    if where == "cuda":
        torch.cuda.synchronize()
    taken = time.perf_counter() - began, time.process_time() - cores_began
    model.zero_grad()
    return taken


def speeds(model: Any, arms: dict[str, list[Any]], rounds: int, where: str) -> dict[str, Any]:
    """Tokens a second of each arm's batches, which are of the same samples; arms take turns.

    Returns:
        By arm: positions that went through the model, median of the tokens/s (padding is none),
        and how many times the first arm's speed it has, the median and the range over rounds: on a
        CPU by the seconds of its cores, in which what else runs there has little part.
    """
    tokens = sum(int((batch["position_ids"] >= 0).sum()) for batch in arms["padding-free"])
    compared = 1 if where == "cpu" else 0
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for batches in arms.values():  # memory is taken, kernels are chosen
        seconds_of(model, [min(batches, key=lambda batch: batch["input_ids"].numel())], where)
    for _ in range(rounds):
        for name, batches in arms.items():
            taken[name].append(seconds_of(model, batches, where))
            print("{}: {:.1f} s, {:.1f} s of the cores".format(name, *taken[name][-1]), flush=True)
    first = taken[next(iter(arms))]
    found = {}
    for name, batches in arms.items():
        pairs = zip(first, taken[name], strict=True)
        ratios = [base[compared] / own[compared] for base, own in pairs]
        found[name] = {
            "tokens": tokens,
            "positions": sum(batch["input_ids"].numel() for batch in batches),
            "tokens_per_second": round(
                tokens / statistics.median(wall for wall, _ in taken[name]), 1
            ),
            "times_padded": round(statistics.median(ratios), 2),
            "range": [round(min(ratios), 2), round(max(ratios), 2)],
        }
    return found


def measure(arguments: argparse.Namespace) -> int:
    """Measure; the last line is JSON."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    cut = {"max_length": arguments.max_length}
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        convert(arguments.inputs, corpus, tokenizer=arguments.model, **cut)
        embed(corpus, dim=32)
        result: dict[str, Any] = {
            "shares": padding_shares(corpus, ChatCollator(tokenizer, **cut), arguments.samples)
        }
        if arguments.steps:
            batches = {}
            for name, (grouped, packing) in ARMS.items():
                loader = loader_of(
                    corpus,
                    ChatCollator(tokenizer, packing=packing, **cut),
                    batch_size=arguments.batch_size,
                    accumulation=arguments.accumulation if grouped else 1,
                )
                batches[name] = list(islice(loader, arguments.steps * arguments.accumulation))
                loader.close()
            model = AutoModelForCausalLM.from_pretrained(
                arguments.model, attn_implementation=arguments.attention
            )
            model.config.use_cache = False
            model.to(arguments.device)
            result["speeds"] = speeds(model, batches, arguments.rounds, arguments.device)
            for name, found in result["speeds"].items():
                print(name, json.dumps(found))
        print(json.dumps(result))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The benchmark's command."""
    arguments = parse(argv)
    return ended(PROGRAM, lambda: measure(arguments))


if __name__ == "__main__":
    sys.exit(main())
