"""Train with Hugging Face's Trainer: change one class, and its checkpoints hold the sampler too.

    python examples/03_hf_trainer.py                # no download, no argument, about a minute

Makes a small corpus of the docstrings of this Python installation, trains on it, stops in the
middle of an epoch as if the machine had been taken away, and goes on from the last checkpoint in a
new trainer. Needs `pip install ".[examples]"`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from quickstart_data import docstring_records, split, train_tokenizer
from streaming import StreamingDataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from slap_stream import SlapConfig
from slap_stream.cli import convert, embed
from slap_stream.cli.command_line import CommandLine, ended, share, to_write, whole
from slap_stream.integrations.transformers import SlapTrainer
from slap_stream.shards.index import corpus_size
from slap_stream.shards.reader import iter_corpus
from slap_stream.text.collate import ChatCollator

BATCH_SIZE = 16
MAX_TOKENS = 128
# Share of the steps after which the machine is taken away.
CUT = 0.7


class TakenAway(TrainerCallback):
    """Ends the training after a share of its steps."""

    def __init__(self, share: float) -> None:
        self.share = share

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Say so to the Trainer when it is time."""
        control.should_training_stop |= state.global_step >= self.share * state.max_steps


def make_corpus(out: Path, records: int, seed: int) -> PreTrainedTokenizerFast:
    """Shards and embeddings to train on in out/train, shards to evaluate on in out/held_out."""
    train, held_out = split(
        docstring_records(records, seed), num_train=records * 3 // 4, num_heldout=256, seed=seed
    )
    tokenizer = train_tokenizer(train, out / "tokenizer")
    for name, part in (("train", train), ("held_out", held_out)):
        source = out / f"{name}.jsonl"
        source.write_text("".join(json.dumps(record) + "\n" for record in part))
        arguments = ("--tokenizer", out / "tokenizer", "--max-length", MAX_TOKENS, "--quiet")
        convert.main([str(word) for word in (source, out / name, *arguments)])
    embed.main([str(out / "train"), "--quiet"])
    return tokenizer


def new_trainer(
    out: Path,
    tokenizer: PreTrainedTokenizerFast,
    *callbacks: TrainerCallback,
    keep: float,
    save_every: int,
) -> SlapTrainer:
    """A trainer as you would write it; only its class and its last two arguments are ours."""
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    args = TrainingArguments(
        output_dir=str(out / "trained"),
        per_device_train_batch_size=BATCH_SIZE,
        num_train_epochs=2,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_ratio=0.05,
        logging_steps=save_every,
        save_steps=save_every,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )
    held_out = out / "held_out"
    return SlapTrainer(
        model=model,
        args=args,
        data_collator=ChatCollator(tokenizer),
        train_dataset=StreamingDataset(local=str(out / "train"), batch_size=BATCH_SIZE),
        eval_dataset=list(iter_corpus(held_out, 0, corpus_size(held_out))),
        callbacks=list(callbacks),
        embeddings=out / "train" / "embeddings.zarr",
        slap_config=SlapConfig(keep=keep, seed=17),
    )


def main() -> int:
    """Train, be interrupted, resume, evaluate."""
    line = CommandLine(description=__doc__.splitlines()[0] if __doc__ else None)
    line.add_argument("--records", type=whole(200), default=3000, help="docstrings to read")
    line.add_argument("--keep", type=share, default=0.7, help="share of candidates trained on")
    line.add_argument("--save-every", type=whole(1), default=25, help="steps between checkpoints")
    line.add_argument("--out", type=to_write, default=Path("runs/hf_trainer"))
    arguments = line.parse_args()
    out: Path = arguments.out
    if out.exists():
        line.error(f"argument --out: must be new, got {out}; remove it, or name another one")
    steps = 2 * int(arguments.keep * (arguments.records * 3 // 4) / BATCH_SIZE)
    if arguments.save_every > CUT * steps:
        line.error(
            f"argument --save-every: must be at most {int(CUT * steps)}, so that there is a "
            f"checkpoint to go on from, got {arguments.save_every}; or give more --records"
        )
    out.mkdir(parents=True)
    # For a model this small more threads bring little, and on a busy machine they wait for another.
    torch.set_num_threads(1)

    tokenizer = make_corpus(out, arguments.records, seed=0)
    settings: dict[str, Any] = {"keep": arguments.keep, "save_every": arguments.save_every}
    first = new_trainer(out, tokenizer, TakenAway(CUT), **settings)
    first.train()
    print(f"taken away after step {first.state.global_step} of {first.state.max_steps}")

    # Model, optimizer, schedule, and the sampler with the batches that it had composed ahead.
    again = new_trainer(out, tokenizer, **settings)
    again.train(resume_from_checkpoint=True)
    metrics = again.loader.metrics()
    print(
        f"step {again.state.global_step} of {again.state.max_steps}: the last epoch trained on "
        f"{metrics['trained']:,.0f} of {metrics['offered']:,.0f} samples, held-out loss "
        f"{again.evaluate()['eval_loss']:.3f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(ended(Path(__file__).name, main))
