"""Train on MDS shards that you already have: the ten lines of the README, as a whole script.

    slap-embed SHARDS --text-column text            # once; writes SHARDS/embeddings.zarr
    python examples/02_wrap_streaming_dataset.py SHARDS --model MODEL --text-column text

SHARDS is a directory with an index.json, MODEL a causal language model with its tokenizer, both on
disk. Shards that slap-convert made need no --text-column. Run again with the same --out, and the
training goes on from its last checkpoint, the batches composed ahead included.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from streaming import StreamingDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from slap_stream import ChatCollator, LearnabilityProbe, SlapConfig, SlapDataLoader, per_sample_loss
from slap_stream.cli.command_line import CommandLine, ended, real, share, to_write, whole


def collate_text(
    collate: ChatCollator, column: str, samples: Sequence[dict[str, Any]]
) -> dict[str, torch.Tensor]:
    """Make a batch of plain text: every token is learnt."""
    return collate(
        [{"messages": [{"role": "text", "content": sample[column]}]} for sample in samples]
    )


def main() -> int:
    """One epoch over the shards, with a checkpoint now and then."""
    line = CommandLine(description=__doc__.splitlines()[0] if __doc__ else None)
    line.add_argument("shards", type=Path, help="directory with index.json and embeddings.zarr")
    line.add_argument("--remote", help="where the shards are fetched from, if they are not here")
    line.add_argument("--model", required=True, help="directory of the model and its tokenizer")
    line.add_argument("--text-column", help="column with plain text; default: messages or tokens")
    line.add_argument("--max-length", type=whole(2), default=1024, help="tokens kept of a sample")
    line.add_argument("--batch-size", type=whole(1), default=32)
    line.add_argument("--keep", type=share, default=0.7, help="share of candidates trained on")
    line.add_argument("--learning-rate", type=real(0.0, above=True), default=2e-5)
    line.add_argument("--num-workers", type=whole(0), default=2, help="processes that read")
    line.add_argument("--save-every", type=whole(1), default=200, help="steps between checkpoints")
    line.add_argument("--out", type=to_write, default=Path("trained"), help="model and checkpoint")
    arguments = line.parse_args()
    if arguments.remote is None and not (arguments.shards / "index.json").is_file():
        line.error(f"shards must be a directory with an index.json, got {arguments.shards}")
    # A line every half minute that says how fast samples come and what was pruned.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("slap_stream").setLevel(logging.INFO)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model = AutoModelForCausalLM.from_pretrained(arguments.model).to(device)
    except (OSError, ValueError) as error:
        line.error(f"argument --model: must be loadable, got {arguments.model!r}; {error}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate)
    dataset = StreamingDataset(
        remote=arguments.remote, local=str(arguments.shards), batch_size=arguments.batch_size
    )
    shard, column = dataset.shards[0], arguments.text_column
    encodings = dict(zip(shard.column_names, shard.column_encodings, strict=True))
    texts = [name for name, encoding in encodings.items() if encoding == "str"]
    chats = {"messages", "input_ids"} & encodings.keys()
    if column not in texts and (column is not None or not chats):
        # Else it would fail when the first batch is collated.
        line.error(f"argument --text-column: must be one of {texts}, got {column!r}")
    collate: Any = ChatCollator(tokenizer, max_length=arguments.max_length)
    if column is not None:
        collate = partial(collate_text, collate, column)
    loader = SlapDataLoader(
        dataset,
        batch_size=arguments.batch_size,
        embeddings=arguments.shards / "embeddings.zarr",
        config=SlapConfig(keep=arguments.keep, seed=17),
        num_workers=arguments.num_workers,
        collate_fn=collate,
    )
    probe = LearnabilityProbe(model, loader, optimizer=optimizer)

    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoint, part = arguments.out / "checkpoint.pt", arguments.out / "checkpoint.part"
    step = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=False)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["loader"])
        step = saved["step"]
        print(f"going on after step {step}")

    # A checkpoint of a finished epoch must not begin the next one.
    for batch in loader if loader.epoch == 0 else ():
        ids = batch.pop("sample_id")
        batch = {name: value.to(device) for name, value in batch.items()}
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        losses = per_sample_loss(output.logits, batch["labels"])
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        loader.observe(ids, losses)
        probe.step()
        step += 1
        if step % arguments.save_every == 0 or loader.progress == 1.0:
            print(f"step {step}  {loader.progress:4.0%}  loss {losses.mean():.3f}", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            # Renamed when it is whole, so that an interrupt leaves the one before.
            torch.save(state | {"loader": loader.state_dict(), "step": step}, part)
            part.replace(checkpoint)

    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    metrics = loader.metrics()
    print(f"trained on {metrics['trained']:,.0f} of {metrics['offered']:,.0f} samples")
    return 0


if __name__ == "__main__":
    sys.exit(ended(Path(__file__).name, main, interrupted="interrupted; the same command goes on"))
