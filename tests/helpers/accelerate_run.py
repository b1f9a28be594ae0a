"""Training loops over a prepared loader; run as a module, two processes of them.

    python -m tests.helpers.accelerate_run FOLDER OUT

Results go to OUT/rank0.json and OUT/rank1.json.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from streaming import StreamingDataset
from streaming.base.shared import prefix
from transformers import LlamaForCausalLM, get_linear_schedule_with_warmup

from slap_stream import ChatCollator, LearnabilityProbe, SlapConfig, SlapDataLoader, per_sample_loss
from tests.laws import config_of
from tests.test_training import byte_tokenizer

PROCESSES = 2
EPOCHS = 2


class Job:
    """A training as users of Accelerate write it: all is prepared, and the loader registered.

    Attributes:
        ids: Of each batch.
        losses: Mean of each batch.
        steps: Batches after which an optimizer step was taken.
    """

    def __init__(
        self,
        folder: Path,
        *,
        batch_size: int = 8,
        accumulation: int = 4,
        config: SlapConfig | None = None,
        **options: Any,
    ) -> None:
        self.accelerator = Accelerator(gradient_accumulation_steps=accumulation, cpu=True)
        loader = SlapDataLoader(
            StreamingDataset(local=str(folder / "corpus"), batch_size=batch_size),
            embeddings=folder / "corpus" / "embeddings.zarr",
            config=config or config_of(num_lanes=2, lookahead=4, warmup_losses=48, probe_every=2),
            collate_fn=ChatCollator(byte_tokenizer(), max_length=96),
            **options,
        )
        model = LlamaForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        # Accelerate steps a scheduler once for each process.
        steps = EPOCHS * -(-len(loader) // accumulation) * self.accelerator.num_processes
        scheduler = get_linear_schedule_with_warmup(optimizer, 0, steps)
        prepared = self.accelerator.prepare(model, optimizer, loader, scheduler)
        self.model, self.optimizer, self.loader, self.scheduler = prepared
        assert self.loader is loader
        self.accelerator.register_for_checkpointing(loader)
        self.probe = LearnabilityProbe(self.model, loader, optimizer=self.optimizer)
        self.ids: list[list[int]] = []
        self.losses: list[float] = []
        self.steps: list[int] = []

    def train(self, *, saves: dict[int, Path] | None = None) -> None:
        """Go on to the end of the last epoch; checkpoints after some batches."""
        while self.loader.epochs_done < EPOCHS:
            for batch in self.loader:
                with self.accelerator.accumulate(self.model):
                    output = self.model(batch["input_ids"], batch["attention_mask"])
                    losses = per_sample_loss(output.logits, batch["labels"])
                    self.accelerator.backward(losses.mean())
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                self.loader.observe(batch["sample_id"], losses)
                if self.accelerator.sync_gradients:
                    self.probe.step()
                    self.steps.append(len(self.ids) + 1)
                self.ids.append(batch["sample_id"].tolist())
                self.losses.append(losses.mean().item())
                if saves and len(self.ids) in saves:
                    self.accelerator.save_state(str(saves[len(self.ids)]))


def main(rank: int, folder: Path, out: Path) -> None:
    """An unbroken training, and one that goes on from its checkpoint in mid-epoch."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(PROCESSES),
        "LOCAL_WORLD_SIZE": str(PROCESSES),
    }
    first = 10**6 + os.getppid() % 997 * 10_000
    prefix._each_prefix_int = lambda: iter(range(first, first + 1000))
    store = torch.distributed.FileStore(str(out / "store"), PROCESSES)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    unbroken, again = Job(folder, batch_size=4), None
    unbroken.train(saves={8: out / "saved"})
    again = Job(folder, batch_size=4)
    again.accelerator.load_state(str(out / "saved"))
    again.train()
    weights = torch.cat([p.detach().flatten() for p in unbroken.model.parameters()])
    result = {
        "ids": unbroken.ids,
        "steps": unbroken.steps,
        "resumed": again.ids,
        "same losses": again.losses == unbroken.losses[8:],
        "rates": unbroken.scheduler.get_last_lr(),
        "weights": float(weights.double().sum()),
        "model": type(unbroken.model).__name__,
        "lanes": unbroken.loader.config.num_lanes,
    }
    (out / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    children = []
    for number in range(PROCESSES):
        child = os.fork()
        if not child:
            try:
                main(number, *map(Path, sys.argv[1:3]))
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            # As at a normal exit, which would go on after the parent's fork.
            atexit._run_exitfuncs()
            os._exit(0)
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))
