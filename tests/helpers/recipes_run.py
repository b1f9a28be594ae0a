"""Trainings by the recipes of docs/trainers.md; run as a module, on two ranks.

    python -m tests.helpers.recipes_run FOLDER OUT

Results go to OUT/rank0.json and OUT/rank1.json.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from streaming import StreamingDataset
from streaming.base.shared import prefix
from transformers import LlamaForCausalLM, get_linear_schedule_with_warmup

from slap_stream import ChatCollator, LearnabilityProbe, SlapDataLoader, per_sample_loss
from tests.helpers.forked import run_forked
from tests.laws import config_of
from tests.test_docs import recipe
from tests.test_training import byte_tokenizer

PROCESSES = 2
EPOCHS = 2


def loader_of(folder: Path, batch_size: int, **options: Any) -> SlapDataLoader:
    """A loader that refreshes often."""
    return SlapDataLoader(
        StreamingDataset(local=str(folder / "corpus"), batch_size=batch_size),
        embeddings=folder / "corpus" / "embeddings.zarr",
        collate_fn=ChatCollator(byte_tokenizer(), max_length=96),
        **{
            "config": config_of(num_lanes=2, lookahead=4, warmup_losses=48, probe_every=2),
            **options,
        },
    )


class Accelerated:
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
        **options: Any,
    ) -> None:
        self.accelerator = Accelerator(gradient_accumulation_steps=accumulation, cpu=True)
        loader = loader_of(folder, batch_size, **options)
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


def lightning_module(folder: Path, batch_size: int = 8, **options: Any) -> Any:
    """The recipe's module, on other settings, which writes down what it trains on."""
    scope: dict[str, Any] = {}
    exec(compile(recipe("Lightning").split("\ntrainer = ")[0], "docs/trainers.md", "exec"), scope)

    class Recording(scope["Tuning"]):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(folder / "model")
            self.ids: list[list[int]] = []
            self.losses: list[float] = []
            self.steps: list[int] = []

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-2)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.ids.append(batch["sample_id"].tolist())
            self.losses.append(loss.item())
            self.wrapped = type(self.trainer.strategy.model).__name__
            return loss

        def optimizer_step(self, *arguments: Any, **options: Any) -> None:
            super().optimizer_step(*arguments, **options)
            self.steps.append(len(self.ids))

    scope["SlapDataLoader"] = lambda *_, **__: loader_of(folder, batch_size, **options)
    scope["StreamingDataset"] = lambda **_: None
    return Recording()


def fit(module: Any, out: Path, checkpoint: Path | None = None, **settings: Any) -> None:
    """Train for two epochs; checkpoints after every third step and every epoch.

    A run that goes on writes its own elsewhere: Lightning writes the one that it has read again, a
    batch later.
    """
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    every: dict[str, Any] = {"dirpath": out, "save_top_k": -1}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        use_distributed_sampler=False,
        accumulate_grad_batches=4,
        callbacks=[
            ModelCheckpoint(filename="{step}", every_n_train_steps=3, **every),
            ModelCheckpoint(filename="{epoch}", save_on_train_epoch_end=True, **every),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, ckpt_path=checkpoint, weights_only=False)


def with_accelerate(folder: Path, out: Path) -> dict[str, Any]:
    """With Accelerate: an unbroken training, and one that goes on from its checkpoint."""
    unbroken = Accelerated(folder, batch_size=4)
    unbroken.train(saves={8: out / "saved"})
    again = Accelerated(folder, batch_size=4)
    again.accelerator.load_state(str(out / "saved"))
    again.train()
    return {
        **told(unbroken, again),
        "rates": unbroken.scheduler.get_last_lr(),
        "model": type(unbroken.model).__name__,
    }


def with_lightning(folder: Path, out: Path) -> dict[str, Any]:
    """With Lightning, likewise."""
    unbroken, again = (lightning_module(folder, batch_size=4) for _ in range(2))
    options = {"devices": PROCESSES, "strategy": "ddp"}
    fit(unbroken, out, **options)
    fit(again, out / "again", out / "step=3.ckpt", **options)
    return {**told(unbroken, again), "model": unbroken.wrapped}


def told(unbroken: Any, again: Any) -> dict[str, Any]:
    """What both of them trained on."""
    weights = torch.cat([p.detach().flatten() for p in unbroken.model.parameters()])
    return {
        "ids": unbroken.ids,
        "steps": unbroken.steps,
        "resumed": again.ids,
        "same losses": again.losses == unbroken.losses[-len(again.losses) :],
        "weights": float(weights.double().sum()),
    }


def main(rank: int, folder: Path, out: Path) -> None:
    """One rank's process, as torchrun starts it."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(PROCESSES),
        "LOCAL_WORLD_SIZE": str(PROCESSES),
        # By which Lightning knows torchrun.
        "TORCHELASTIC_RUN_ID": "none",
    }
    first = 10**6 + os.getppid() % 997 * 10_000
    prefix._each_prefix_int = lambda: iter(range(first, first + 1000))
    store = torch.distributed.FileStore(str(out / "store"), PROCESSES)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    results = {"accelerate": with_accelerate(folder, out)}
    if find_spec("lightning"):
        results["lightning"] = with_lightning(folder, out)
    (out / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if find_spec("lightning"):
        import lightning.pytorch  # noqa: F401  (once for both processes)
    sys.exit(run_forked(PROCESSES, lambda rank: main(rank, *map(Path, sys.argv[1:3]))))
