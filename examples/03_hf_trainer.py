"""Train with Hugging Face's Trainer: change one class, and its checkpoints hold the sampler too.

    python examples/01_quickstart.py                # once: makes the corpus in runs/quickstart
    python examples/03_hf_trainer.py                # no download, about a minute

Trains on that corpus, stops in the middle of an epoch as if the machine had been taken away, and
goes on from the last checkpoint in a new trainer. Needs `pip install ".[trainer]"`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
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
from slap_stream.cli.command_line import CommandLine, ended, share, to_write
from slap_stream.integrations.transformers import SlapTrainer

BATCH_SIZE = 16


class TakenAway(TrainerCallback):
    """Ends the training after 70 % of its steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Say so to the Trainer when it is time."""
        control.should_training_stop |= state.global_step >= 0.7 * state.max_steps


def new_trainer(arguments: Any, *callbacks: TrainerCallback) -> SlapTrainer:
    """A trainer as you would write it; only its class and its last argument are ours."""
    data: Path = arguments.data
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data / "tokenizer")
    held_out = StreamingDataset(local=str(data / "heldout"), batch_size=BATCH_SIZE)
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    return SlapTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(arguments.out),
            per_device_train_batch_size=BATCH_SIZE,
            num_train_epochs=2,
            learning_rate=5e-3,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            logging_steps=0.1,
            save_steps=0.2,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
            disable_tqdm=True,
        ),
        # Chats in MDS shards with their embeddings; JSON lines or a datasets.Dataset would do.
        train_dataset=data / "train",
        processing_class=tokenizer,
        eval_dataset=[held_out[index] for index in range(held_out.num_samples)],
        callbacks=list(callbacks),
        slap_config=SlapConfig(keep=arguments.keep, seed=17),
    )


def main() -> int:
    """Train, be interrupted, resume, evaluate."""
    line = CommandLine(description=__doc__.splitlines()[0] if __doc__ else None)
    line.add_argument("--data", type=Path, default=Path("runs/quickstart"), help="the quickstart's")
    line.add_argument("--keep", type=share, default=0.7, help="share of candidates trained on")
    line.add_argument("--out", type=to_write, default=Path("runs/hf_trainer"))
    arguments = line.parse_args()
    if not (arguments.data / "train" / "embeddings.zarr").exists():
        line.error(f"--data must be what 01_quickstart.py made, got {arguments.data}; run it first")
    if arguments.out.exists():
        line.error(f"--out must be new, got {arguments.out}; remove it, or name another one")
    torch.set_num_threads(1)  # For a model this small more threads bring little.

    first = new_trainer(arguments, TakenAway())
    first.train()
    print(f"taken away after step {first.state.global_step} of {first.state.max_steps}")

    # Model, optimizer, schedule, and the sampler with the batches that it had composed ahead.
    again = new_trainer(arguments)
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
