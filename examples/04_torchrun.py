"""Train on any number of processes, be interrupted, and go on with another number of them.

    python examples/01_quickstart.py                           # once: makes runs/quickstart
    python examples/04_torchrun.py                             # one process, a minute
    torchrun --nproc-per-node 2 examples/04_torchrun.py        # two, with DDP
    torchrun --nproc-per-node 2 examples/04_torchrun.py --fsdp # two, with fully_shard (FSDP2)

Saves a checkpoint every --save-every steps with torch.distributed.checkpoint. Run again with the
same --out, on as many processes or on others, and the training goes on from the last one with the
same batches.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from streaming import StreamingDataset
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slap_stream import ChatCollator, LearnabilityProbe, SlapConfig, SlapDataLoader, per_sample_loss
from slap_stream.cli.command_line import CommandLine, ended, share, to_write, whole

# Fixed for a run, like the number of lanes; each process takes its part of the batch.
GLOBAL_BATCH, LANES = 16, 4


class Training:
    """Model, optimizer and step as torch.distributed.checkpoint saves and loads them."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer, self.step = model, optimizer, 0

    def state_dict(self) -> dict[str, Any]:
        """Whole or sharded, as the model is."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.step = state["step"]


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The same weights on every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config)


def main() -> int:
    """One epoch, saved now and then."""
    line = CommandLine(description=__doc__.splitlines()[0] if __doc__ else None)
    line.add_argument("--fsdp", action="store_true", help="shard the model; default: DDP")
    line.add_argument("--data", type=Path, default=Path("runs/quickstart"), help="the quickstart's")
    line.add_argument("--keep", type=share, default=0.7, help="share of candidates trained on")
    line.add_argument("--save-every", type=whole(1), default=20, help="steps between checkpoints")
    line.add_argument("--stop-after", type=whole(1), help="steps, as if interrupted then")
    line.add_argument("--out", type=to_write, default=Path("runs/torchrun"))
    arguments = line.parse_args()
    out, corpus = arguments.out, arguments.data / "train"
    if not (corpus / "embeddings.zarr").exists():
        line.error(f"--data must be what 01_quickstart.py made, got {arguments.data}; run it first")

    # Also on one process, so that there is one way only; streaming reads these variables too.
    single = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    for name, value in (single | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}).items():
        os.environ.setdefault(name, str(value))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        # For a model this small more threads bring little.
        torch.set_num_threads(1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if LANES % world_size:
        line.error(f"processes must divide {LANES}, the lanes of this example, got {world_size}")

    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.data / "tokenizer")

    # Of all processes, each makes the dataset, the loader and the probe.
    batch_size = GLOBAL_BATCH // world_size
    dataset = StreamingDataset(local=str(corpus), batch_size=batch_size)
    loader = SlapDataLoader(
        dataset,
        batch_size=batch_size,
        embeddings=corpus / "embeddings.zarr",
        config=SlapConfig(keep=arguments.keep, seed=17, num_lanes=LANES),
        collate_fn=ChatCollator(tokenizer),
    )
    model: Any = new_model(tokenizer).to(device)
    if arguments.fsdp:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    elif world_size > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    probe = LearnabilityProbe(model, loader, optimizer=optimizer)

    training = Training(model, optimizer)
    saved = {"training": training, "loader": loader}
    last = out / "last"
    if last.exists():
        dcp.load(saved, checkpoint_id=out / last.read_text())
        if rank == 0:
            print(f"going on after step {training.step} on {world_size} processes")

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
        training.step += 1
        if training.step % arguments.save_every == 0 or loader.progress == 1.0:
            # Every process takes part; the file that names it is written when it is there.
            name = f"step-{training.step}"
            dcp.save(saved, checkpoint_id=out / name)
            if rank == 0:
                (out / "last.part").write_text(name)
                (out / "last.part").replace(last)
                print(f"step {training.step}  {loader.progress:4.0%}  loss {losses.mean():.3f}")
        if training.step == arguments.stop_after:
            break

    if rank == 0 and loader.progress == 1.0:
        steps = loader.metrics()["step"]
        print(f"trained on {steps * GLOBAL_BATCH:,.0f} of {dataset.num_samples:,} samples")
    loader.close()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(ended(Path(__file__).name, main, interrupted="interrupted; the same command goes on"))
