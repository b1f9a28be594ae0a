"""Four processes of two simulated nodes; each scenario runs on some of them. See `test_ranks`.

Started once: the processes are forks of one that has done the imports. Results go to
OUT/rank0.json to rank3.json.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from datasets import Dataset
from streaming import StreamingDataset
from streaming.base.shared import barrier, prefix
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from slap_stream import LearnabilityProbe, SlapDataLoader, per_sample_loss
from slap_stream.corpus.convert import convert as corpus_convert
from slap_stream.errors import ConfigError, CorpusError, ExchangeError, StateError
from slap_stream.integrations import first_rank
from slap_stream.integrations import prepare as preparation
from slap_stream.integrations.trainer_loader import TrainerLoader
from slap_stream.integrations.training_set import with_training_set
from slap_stream.integrations.transformers import SlapTrainer
from slap_stream.loader import ranks as distributed
from tests.helpers.forked import run_forked
from tests.helpers.tiny_models import VOCABULARY, llama
from tests.laws import config_of
from tests.shards.test_cache_limit import Counting

SENDING = ("all_", "broadcast", "gather", "reduce", "scatter", "send", "isend")
PROCESSES, NODES = 4, 2
BATCH = 16
LOSSES = np.random.default_rng(3).gamma(4.0, 0.5, 4000)


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A few tokens that follow from the sample's number."""
    numbers = torch.tensor([sample["number"] for sample in samples])
    tokens = (numbers[:, None] * torch.arange(1, 9)) % (VOCABULARY - 3) + 3
    return {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}


class Run:
    """One process of the job: its datasets, and loaders over them."""

    def __init__(self, rank: int, corpus: Path, broken: Path, out: Path) -> None:
        self.rank, self.out, self.barrier = rank, out, dist.barrier
        node = rank * NODES // PROCESSES
        local = tempfile.mkdtemp(prefix=f"node{node}") if rank % 2 == 0 else ""
        homes = [None] * PROCESSES
        dist.all_gather_object(homes, local)
        home = Path(str(homes[rank - rank % 2]))
        make = StreamingDataset
        self.datasets = {
            "whole": make(remote=str(corpus), local=str(home / "whole"), batch_size=None),
            "broken": make(local=str(broken), batch_size=None),
            "twins": make(local=str(corpus), batch_size=None, replication=2),
            # As little as streaming itself puts up with.
            "limited": make(
                streams=[Counting(remote=str(corpus) + "-large", local=str(home / "limited"))],
                batch_size=None,
                cache_limit=20_000,
            ),
        }
        # Node leaders only touch what they share with their own node.
        self.groups = {1: dist.new_group([0]), 2: dist.new_group([0, 1]), 4: None}
        vectors = np.random.default_rng(0).normal(size=(4000, 8)).astype(np.float16)
        self.vectors = vectors

    def loader(
        self,
        world_size: int = PROCESSES,
        *,
        data: str = "whole",
        config: Any = None,
        **options: Any,
    ) -> SlapDataLoader:
        """A loader of this process among the first `world_size`."""
        dataset = self.datasets[data]
        ranks = world_size // (dataset.replication or 1)
        return SlapDataLoader(
            dataset,
            BATCH // ranks,
            embeddings=self.vectors[: dataset.num_samples],
            config=config or config_of(num_lanes=4, lookahead=4),
            **(
                {
                    "process_group": self.groups[world_size],
                    "exchange_timeout": 60.0,
                    "collate_fn": collate,
                }
                | options
            ),
        )


def feed(loader: SlapDataLoader, batch: Any) -> list[int]:
    ids: list[int] = batch["sample_id"].tolist()
    loader.observe(ids, LOSSES[ids])
    return ids


def batches(
    loader: SlapDataLoader, probe: LearnabilityProbe | None = None, most: int | None = None
) -> list[list[int]]:
    """The rest of the epoch, or its next batches."""
    found = []
    for batch in islice(loader, most):
        found.append(feed(loader, batch))
        if probe is not None:
            probe.step()
    return found


def frozen(loader: SlapDataLoader) -> LearnabilityProbe:
    torch.manual_seed(0)
    return LearnabilityProbe(llama(), loader, batch_size=3)


def laws(run: Run) -> dict[str, Any]:
    """The same epochs on 1, 2 and 4 ranks, with a table of losses and with a probe; saved on 4 in
    the middle of everything, gone on with on 4, 2 and 1."""
    found: dict[str, Any] = {}
    for name, attach in (("table", None), ("probe", frozen)):
        saved = None
        for world_size in (4, 2, 1):
            if run.rank >= world_size:
                continue
            loader = run.loader(world_size)
            probe = attach and attach(loader)
            ids = batches(loader, probe, 7)
            if world_size == 4:
                saved = loader.state_dict()
                found[f"{name} lanes"] = [lane["lane"] for lane in saved["sampler"]["lanes"]]
            ids += batches(loader, probe)
            ids += batches(loader, probe, 5)
            found[f"{name} {world_size}"] = ids
            loader.close()
            again = run.loader(world_size)
            again.load_state_dict(json.loads(json.dumps(saved, default=lambda a: a.tolist())))
            probe = attach and attach(again)
            found[f"{name} from 4 on {world_size}"] = batches(again, probe) + batches(
                again, probe, 5
            )
            again.close()
    return found


def cost(run: Run) -> dict[str, Any]:
    """Collectives of any kind between one batch and the next, once without and once with a probe;
    the gloo ones are ours."""
    found: dict[str, Any] = {}
    for name, attach in (("table", None), ("probe", frozen)):
        loader = run.loader(num_workers=int(name == "table"))
        probe = attach and attach(loader)
        with counted() as calls:
            steps = []
            for batch in loader:
                feed(loader, batch)
                if probe is not None:
                    probe.step()
                steps.append(dict(calls))
                calls.clear()
        found[name] = steps
        found[f"{name} metrics"] = loader.metrics()
        loader.close()
    return found


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Calls of everything that sends something to another process."""
    calls: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls[name if owner is dist else f"gloo.{name}"] += 1
            return original(*arguments, **options)

        patch.setattr(owner, name, call)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "all_to_all", "gather", "broadcast"):
            count(distributed.Gloo, name)
        for name in dist.distributed_c10d.__all__:
            if name.startswith(SENDING):
                count(dist, name)
        yield calls


def cut_short(run: Run) -> dict[str, Any]:
    """A bad shard of one lane, and nothing to spare."""
    config = config_of(num_lanes=4, lookahead=4, on_bad_shard="skip", max_withdrawn=1.0, keep=1.0)
    found: dict[str, Any] = {}
    for world_size in (4, 1):
        if run.rank < world_size:
            loader = run.loader(world_size, data="broken", config=config)
            found[str(world_size)] = batches(loader)
            found[f"metrics {world_size}"] = loader.metrics()
            found[f"next {world_size}"] = batches(loader, most=3)
            loader.close()
    return found


def collate_odd(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    if any(sample["number"] % 2 == 0 for sample in samples):
        raise ValueError("an even one")
    return collate(samples)


def bad_samples(run: Run) -> dict[str, Any]:
    """Half of all samples cannot be used: in some batches all of a lane's."""
    config = config_of(num_lanes=4, lookahead=4, max_withdrawn=1.0)
    found: dict[str, Any] = {}
    for world_size in (4, 1):
        if run.rank < world_size:
            loader = run.loader(world_size, config=config, collate_fn=collate_odd)
            found[str(world_size)] = batches(loader, frozen(loader))
            found[f"withdrawn {world_size}"] = loader.metrics()["samples_withdrawn"]
            loader.close()
    return found


def replicas(run: Run) -> dict[str, Any]:
    """Tensor parallel processes: by the dataset's replication, by a mesh, and by number."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))["data"]
    arguments: dict[str, dict[str, Any]] = {
        "replication": {"data": "twins"},
        "mesh": {"process_group": mesh.get_group(), "world_size": 2},
        "numbers": {"rank": run.rank // 2, "world_size": 2},
    }
    found: dict[str, Any] = {}
    for name, options in arguments.items():
        options = dict(options)
        data = options.pop("data", "whole")
        if name == "mesh":
            options["rank"] = mesh.get_local_rank()
        loader = SlapDataLoader(
            run.datasets[data],
            BATCH // 2,
            embeddings=run.vectors[:400],
            config=config_of(num_lanes=4, lookahead=4),
            collate_fn=collate,
            **options,
        )
        found[name] = batches(loader)
        found[f"{name} lanes"] = len(loader.state_dict()["sampler"]["lanes"])
        if name == "numbers":
            # As if one of two twins had been fed other losses.
            loader.sampler._refreshes._digest += run.rank == 3
            found["parted"] = error_of(loader.probe_host().refresh)
        loader.close()
    return found


def limited(run: Run) -> dict[str, Any]:
    """An epoch with the least `cache_limit` of a node that is not refused."""
    config = config_of(num_lanes=4, lookahead=2, shards_per_block=1, pool_batches=2)
    message = error_of(lambda: run.loader(data="limited", config=config))
    dataset = run.datasets["limited"]
    dataset.cache_limit = int(re.findall(r"\d+", message)[0])
    ids = batches(run.loader(data="limited", config=config))
    local = dataset.streams[0].local
    return {
        "error": message,
        "limit": dataset.cache_limit,
        "batches": len(ids),
        "downloads": Path(f"{local}.log").read_text().splitlines(),
    }


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ConfigError, CorpusError, ExchangeError, StateError) as error:
        return str(error)
    return ""


def errors(run: Run) -> dict[str, Any]:
    """Ranks that do different things, and one that does not come."""
    found = {}
    loader = run.loader()
    batches(loader, most=2)
    found["mismatch"] = error_of(
        loader.state_dict if run.rank == 1 else loader.probe_host().refresh
    )
    loader.close()
    loader = run.loader()
    batches(loader, most=2 + (run.rank == 2))
    found["elsewhere"] = error_of(loader.probe_host().refresh)
    loader.close()
    other = config_of(num_lanes=4, lookahead=4, seed=run.rank % 2)
    found["seeds"] = error_of(
        lambda: SlapDataLoader(
            run.datasets["whole"], BATCH, embeddings=run.vectors[:400], config=other
        )
    )
    found["join"] = error_of(lambda: distributed.join_ranks(rank=0, world_size=4))
    state = run.loader().state_dict()
    config = config_of(num_lanes=4, lookahead=4)
    dataset = run.datasets["whole"]
    twice = SlapDataLoader(dataset, BATCH, embeddings=run.vectors[:400], config=config)
    found["global batch"] = error_of(lambda: twice.load_state_dict(state))
    loader = run.loader(exchange_timeout=2.0)
    batches(loader, most=2)
    began = time.monotonic()
    if run.rank == 3:
        time.sleep(3.0)
    else:
        found["late"] = error_of(loader.probe_host().refresh)
        found["waited"] = time.monotonic() - began
    return found


def training(run: Run) -> dict[str, Any]:
    """With DDP and FSDP2 the probe sees what it sees of the whole model; torch's checkpoints."""
    found: dict[str, Any] = {}
    for name in ("plain", "ddp", "fsdp"):
        torch.manual_seed(0)
        model: Any = llama()
        if name == "ddp":
            model = DistributedDataParallel(model)
        elif name == "fsdp":
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        loader = run.loader()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        probe = LearnabilityProbe(model, loader, batch_size=3)
        losses, ids = [], []
        for batch in loader:
            ids.append(batch["sample_id"].tolist())
            output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            loss = per_sample_loss(output.logits, batch["labels"])
            loss.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            loader.observe(batch["sample_id"], LOSSES[ids[-1]])
            losses.append(loss.mean().item())
            probe.step()
            if len(ids) == 9 and name == "fsdp":
                folder = str(run.out / "checkpoint")
                dcp.save({"loader": loader}, checkpoint_id=folder)
        found[name] = ids
        found[f"{name} losses"] = losses
        if name == "fsdp":
            again = run.loader()
            dcp.load({"loader": again}, checkpoint_id=folder)
            LearnabilityProbe(model, again, batch_size=3)
            found["again"] = [batch["sample_id"].tolist() for batch in islice(again, 4)]
            weight = model.lm_head.weight
            found["sharded"] = isinstance(weight, DTensor) and weight.to_local().shape[0]
        probe = LearnabilityProbe(model, run.loader(), optimizer=optimizer)
        found[f"{name} moment"] = probe._moment.factors()[0][:5].tolist()
        found[f"{name} probe"] = probe.metrics()
    return found


def trainer(run: Run) -> dict[str, Any]:
    """SlapTrainer under DDP, saved after four steps and gone on with."""
    found: dict[str, Any] = {}
    # Accelerate's own ones are none of our business.
    dist.barrier = run.barrier
    # The Trainer's DDP on CPUs loads optimizers to "cpu:0", which torch.load does not know.
    torch.serialization.register_package(
        0, lambda _: None, lambda storage, place: storage if place == "cpu:0" else None
    )

    class Recording(SlapTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            found[stage].append(inputs["sample_id"].tolist())
            return super().training_step(model, inputs, num_items_in_batch)

    for stage, resume in (("whole", None), ("rest", str(run.out / "trainer" / "checkpoint-13"))):
        found[stage] = []
        torch.manual_seed(0)
        args = TrainingArguments(
            str(run.out / "trainer"),
            per_device_train_batch_size=BATCH // PROCESSES,
            num_train_epochs=1,
            learning_rate=1e-3,
            save_strategy="steps" if resume is None else "no",
            save_steps=13,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
        )
        made = Recording(
            llama(),
            args,
            collate,
            run.datasets["whole"],
            embeddings=run.vectors[:400],
            slap_config=config_of(num_lanes=4, lookahead=4),
        )
        made.train(resume_from_checkpoint=resume)
        found[f"{stage} steps"] = made.state.global_step
        found[f"{stage} wrapped"] = type(made.model_wrapped).__name__
        assert made.loader is not None
        found[f"{stage} metrics"] = made.loader.metrics()
    return found


def preparing(run: Run) -> dict[str, Any]:
    """A dataset that every rank has, on a disk that all see, and on disks of the nodes' own."""
    # In every process another fingerprint, as what `datasets` cannot name by its content has.
    dataset = Dataset.from_list([{"text": f"text {n}"} for n in range(20)])
    dataset._fingerprint = f"of rank {run.rank}"
    found: dict[str, Any] = {}
    node = run.rank * NODES // PROCESSES
    calls: Counter[str] = Counter()

    def convert(*arguments: Any, **options: Any) -> Any:
        calls[stage] += 1
        time.sleep(0.2)
        return corpus_convert(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "convert", convert)
        for stage, folder in (("shared", "seen"), ("own", f"node{node}")):
            prepared = preparation.prepare(dataset, run.out / folder)
            found[stage] = str(prepared.corpus), prepared.num_samples, prepared.index_digest
            found[f"{stage} calls"] = calls[stage]
        here = Dataset.from_list([{"text": "" if run.rank == 0 else "text"}] * 3)
        found["first fails"] = error_of(lambda: preparation.prepare(here, run.out / "bad"))
        other = dataset if node == 0 else dataset.select(range(10))
        # Made on the second node, as its disk does not show it.
        folder = run.out / f"other{node}"
        found["others differ"] = error_of(lambda: preparation.prepare(other, folder))
        lines = run.out / ("lines.jsonl" if node == 0 else "not_on_this_node.jsonl")
        if run.rank == 0:
            lines.write_text('{"text": "a"}\n')
        missing = run.out / f"missing{node}"
        found["not there"] = error_of(lambda: preparation.prepare(lines, missing))
        settings = TrainingArguments(str(run.out / "trainer"), use_cpu=True, report_to=[])
        given = {"train_dataset": lines, "data_collator": list}
        found["trainer"] = error_of(lambda: with_training_set(given, None, missing, settings))
        # The last of all: those who did not come would not know the others' next groups.
        patch.setattr(first_rank, "MEETING", timedelta(seconds=1))
        began = time.monotonic()
        if run.rank:
            found["not come"] = error_of(lambda: preparation.prepare(dataset, run.out / "none"))
        found["not come seconds"] = time.monotonic() - began
    return found


def unwritable(run: Run) -> dict[str, Any]:
    """The second of two ranks has a file where its log should be."""
    found: dict[str, Any] = {}
    if run.rank < 2:
        mine = run.out / f"log of {run.rank}"
        if run.rank == 1:
            mine.write_text("")
        found["asked for"] = error_of(lambda: run.loader(2, run_dir=mine))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SlapDataLoader, "needs_log", TrainerLoader.needs_log)
            loader = run.loader(2, run_dir=mine)
        found["batches"] = batches(loader, most=3)
        found["failed"] = loader.metrics()["run_log_failed"]
        found["written"] = [path.name for path in mine.glob("_slap_log/*")]
        loader.close()
    return found


SCENARIOS = [
    *(laws, cost, cut_short, bad_samples, replicas, limited, errors, unwritable),
    *(training, trainer, preparing),
]


def main(rank: int, corpus: Path, broken: Path, out: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(PROCESSES),
        "LOCAL_WORLD_SIZE": str(PROCESSES // NODES),
        "LOCAL_RANK": str(rank % (PROCESSES // NODES)),
        "MASTER_ADDR": "127.0.0.1",
    }
    # The nodes share this machine's shared memory; each counts its names from another number on.
    first = 1000 * (rank * NODES // PROCESSES) + os.getppid() % 997 * 10_000 % 900_000
    prefix._each_prefix_int = lambda: iter(range(first, first + 1000))
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=4)
    run = Run(rank, corpus, broken, out)
    # From here on nothing may wait for streaming's barriers.
    barrier.SharedBarrier.__call__ = _refuse
    dist.barrier = _refuse
    results: dict[str, Any] = {}
    for scenario in SCENARIOS:
        began = time.monotonic()
        results[scenario.__name__] = scenario(run)
        results[scenario.__name__]["seconds"] = time.monotonic() - began
    (out / f"rank{rank}.json").write_text(json.dumps(results))


def _refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("a barrier after construction")


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(run_forked(PROCESSES, lambda rank: main(rank, *map(Path, sys.argv[1:4]))))
