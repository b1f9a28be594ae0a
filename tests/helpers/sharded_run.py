"""Two processes that share a model: DDP, FSDP2 and, where it is installed, DeepSpeed.

See `test_sharded`. The processes are forks of one that has done the imports. Results go to
OUT/rank0.json and OUT/rank1.json.

    python -m tests.helpers.sharded_run CORPUS OUT fsdp
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from streaming import StreamingDataset
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from slap_stream import LearnabilityProbe
from slap_stream.errors import ConfigError, HeadError
from slap_stream.integrations.mixin import SlapMixin
from slap_stream.integrations.transformers import SlapTrainer
from slap_stream.probe.fused import FusedLosses
from tests.helpers.forked import run_forked
from tests.helpers.probe_host import Host, text_batch
from tests.helpers.ranks_run import collate
from tests.helpers.tiny_models import HIDDEN, llama, spread
from tests.laws import config_of
from tests.test_training import byte_tokenizer

PROCESSES, BATCH = 2, 8
BEFORE_5 = transformers.__version__.startswith("4.")


class Notes(SlapMixin):
    """Writes down what each batch was, and what came of it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.ids: list[list[int]] = []
        self.losses: list[float] = []
        super().__init__(*arguments, **options)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self.ids.append(inputs["sample_id"].tolist())
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(float(loss))
        return loss


class Recording(Notes, SlapTrainer):
    """Of the stock Trainer."""


class Run:
    """One process of the job, and the trainings that it makes."""

    def __init__(self, corpus: Path, out: Path) -> None:
        self.out = out
        self.dataset = StreamingDataset(local=str(corpus), batch_size=BATCH)
        self.vectors = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float16)

    def trainer(
        self,
        *,
        keep: Any = 0.7,
        shard: Any = None,
        trl: bool = False,
        model: Any = None,
        **settings: Any,
    ) -> Notes:
        """A trainer as users make it.

        Args:
            keep: Of the candidates.
            shard: What `fsdp_config` is to hold besides what it takes to shard at all; None: DDP.
            trl: Whether it is TRL's.
            model: Makes one; None: a Llama.
            **settings: More of `TrainingArguments`.
        """
        # Each training of a job of its own: what the one before has put there would stay.
        for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
            del os.environ[name]
        settings = {
            "output_dir": str(self.out / "unused"),
            "per_device_train_batch_size": BATCH,
            "num_train_epochs": 1,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": "deepspeed" not in settings,
            "remove_unused_columns": False,
            **settings,
        }
        settings |= {} if shard is None else sharded(**shard)
        held_out: Any = [self.dataset[i] for i in range(4)]
        made, args, also = Recording, None, {}
        if trl:
            made, args, also = supervised(settings)
            # Ids say to TRL that there is nothing left to prepare.
            rows = [{"number": sample["number"], "input_ids": [0]} for sample in held_out]
            held_out = Dataset.from_list(rows)
        args = args or TrainingArguments(**settings)
        if shard is not None:
            as_on_accelerators(distributed_type=DistributedType.MULTI_XPU)
        elif "deepspeed" in settings:
            rank, size = dist.get_rank(), dist.get_world_size()
            as_on_accelerators(num_processes=size, process_index=rank, local_process_index=rank)
        torch.manual_seed(0)
        config = config_of(keep=keep, num_lanes=4, lookahead=4)
        return made(
            # In transformers 4 a cache would grow while a checkpointed layer is called again.
            llama(use_cache=False) if model is None else model(),
            args,
            collate,
            self.dataset,
            held_out,
            embeddings=self.vectors,
            slap_config=config,
            **also,
        )


def supervised(settings: dict[str, Any]) -> tuple[type[Notes], Any, dict[str, Any]]:
    """TRL's trainer, its settings, and what else it is to be given."""
    from trl import SFTConfig

    from slap_stream.integrations.trl import SlapSFTTrainer

    class RecordingSFT(Notes, SlapSFTTrainer):
        """Of TRL's."""

    usual = {"bf16": False, "gradient_checkpointing": False}
    return RecordingSFT, SFTConfig(**usual | settings), {"processing_class": byte_tokenizer()}


def sharded(**config: Any) -> dict[str, Any]:
    """Arguments that ask for FSDP2, and for what else `fsdp_config` is to hold."""
    config = {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        **config,
    }
    if BEFORE_5:
        # These it takes from the environment, or from words beside.
        os.environ["FSDP_VERSION"] = str(config.pop("version"))
        os.environ["FSDP_STATE_DICT_TYPE"] = config.pop("state_dict_type", "FULL_STATE_DICT")
        words = "full_shard auto_wrap" + (" offload" if config.pop("cpu_offload", False) else "")
        # On CPUs accelerate would ask for another device.
        return {"fsdp": words, "fsdp_config": {**config, "sync_module_states": False}}
    return {"fsdp": True, "fsdp_config": config}


def as_on_accelerators(**state: Any) -> None:
    """Accelerate shards, and counts DeepSpeed's processes, on accelerators only.

    All else of it does not mind that the device is the CPU.
    """
    PartialState._shared_state |= state


def told(trainer: Notes) -> dict[str, Any]:
    """What a training was."""
    assert trainer.loader is not None
    assert trainer.probe is not None
    moment = trainer.probe._moment
    logs = trainer.state.log_history
    return {
        "ids": trainer.ids,
        "losses": trainer.losses,
        "norms": [log["grad_norm"] for log in logs if "grad_norm" in log],
        "evaluated": [log["eval_loss"] for log in logs if "eval_loss" in log],
        "steps": trainer.state.global_step,
        "metrics": trainer.loader.metrics(),
        "factors": [factor.tolist() for factor in moment.factors()],
        "sketch": trainer.probe.mean_sketch([text_batch(range(6))]).tolist(),
        "wrapped": type(trainer.model_wrapped).__name__,
        "resting": resting(trainer.model),
    }


def resting(model: torch.nn.Module) -> list[str]:
    """Parameters that are not sharded."""
    return [name for name, weight in model.named_parameters() if not isinstance(weight, DTensor)]


def error_of(call: Callable[[], Any]) -> str:
    """What is said against it."""
    try:
        call()
    except (ConfigError, HeadError) as error:
        return str(error)
    return ""


def resumed(run: Run, name: str, save_steps: int, **settings: Any) -> dict[str, Any]:
    """A training, and what comes of the checkpoint that it leaves in mid-epoch."""
    out = run.out / name
    whole = run.trainer(
        output_dir=str(out), save_strategy="steps", save_steps=save_steps, **settings
    )
    whole.train()
    rest = run.trainer(**settings)
    rest.train(str(out / f"checkpoint-{save_steps}"))
    return {name: told(whole), f"{name} resumed": told(rest)}


def fsdp(run: Run) -> dict[str, Any]:
    """The same training with DDP and FSDP2, another with all that is asked for beside, refusals."""
    # Every epoch's last step is a shorter one. Of step 4 there is a probe before the checkpoint.
    settings: dict[str, Any] = {
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }
    ddp = run.trainer(**settings)
    ddp.train()
    found = {"ddp": told(ddp)} | resumed(run, "full", 4, shard={}, **settings)
    rich = {
        "state_dict_type": "SHARDED_STATE_DICT",
        "activation_checkpointing": True,
        "reshard_after_forward": False,
    }
    if BEFORE_5:
        rich.pop("reshard_after_forward")  # the name of a strategy of FSDP1 there
    found |= resumed(run, "sharded", 8, shard=rich, bf16=True, max_steps=10)
    found["head alone"] = head_alone()
    without_logits = run.trainer(shard={}, model=fused, **settings)
    without_logits.train()
    found["fused"] = told(without_logits)
    if find_spec("trl") is not None:
        found |= with_trl(run, {"trl": {"shard": {}}})
    found["errors"] = {
        "not sharded": error_of(lambda: run.trainer(**sharded())),
        "version": error_of(lambda: run.trainer(shard={"version": 1, "sync_module_states": False})),
        "offload": error_of(lambda: run.trainer(shard={"cpu_offload": True})),
        "compiled": error_of(lambda: run.trainer(shard={}, torch_compile=True)),
    }
    return found


def with_trl(run: Run, kinds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """TRL's trainer with DDP and, by name, with models that are sharded otherwise; resumed."""
    settings: dict[str, Any] = {
        "trl": True,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }
    ddp = run.trainer(**settings)
    ddp.train()
    found = {"trl ddp": told(ddp)}
    for name, kind in kinds.items():
        found |= resumed(run, name, 4, **kind, **settings)
    return found


def fused() -> Any:
    """A model whose training loss keeps no logits and does not call the head, as Liger's."""

    # By the name a Trainer knows that the first label is not counted.
    class LlamaForCausalLM(transformers.LlamaForCausalLM):  # type: ignore[misc]  # not typed
        def forward(
            self, input_ids: Any, attention_mask: Any, labels: Any = None, **others: Any
        ) -> Any:
            if not self.training:
                return super().forward(input_ids, attention_mask, labels=labels, **others)
            hidden = self.model(input_ids, attention_mask).last_hidden_state
            logits = hidden @ self.lm_head.weight.T
            vocabulary = self.config.vocab_size
            return {"loss": self.loss_function(logits, labels, vocabulary, **others)}

    config = llama(use_cache=False).config
    # The weights of the Llama that all other trainings begin with.
    torch.manual_seed(0)
    return spread(LlamaForCausalLM(config))


def head_alone() -> dict[str, Any]:
    """A model whose head is a unit of its own, sharded again as soon as it was called."""
    found: dict[str, Any] = {}
    for kind in ("whole", "sharded"):
        torch.manual_seed(0)
        model = llama()
        if kind == "sharded":
            for module in (model.lm_head, *model.model.layers):
                fully_shard(module, reshard_after_forward=module is model.lm_head)
            fully_shard(model)
        probe = LearnabilityProbe(model, Host())
        found[kind] = probe.mean_sketch([text_batch(range(6))]).tolist()
        found[f"{kind} resting"] = resting(model)
        hidden, labels = torch.zeros(1, 3, HIDDEN), torch.zeros(1, 3, dtype=torch.int64)
        found[f"{kind} fused"] = error_of(partial(FusedLosses(model).of, hidden, labels))
    return found


def deepspeed(run: Run) -> dict[str, Any]:
    """ZeRO 1 to 3 beside DDP, without and with an optimizer of DeepSpeed's."""
    common: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    adam = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    settings = {"gradient_accumulation_steps": 2}
    ddp = run.trainer(**settings)
    ddp.train()
    found = {"ddp": told(ddp)}
    with_pieces: dict[str, dict[str, Any]] = {}
    for stage in (1, 2, 3):
        # Of a model this small ZeRO 3 would otherwise leave everything where it is.
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        asked = {**common, "zero_optimization": zero}
        found |= resumed(run, f"zero {stage}", 4, deepspeed=asked, **settings)
        with_pieces[f"trl zero {stage}"] = {"deepspeed": asked}
    if find_spec("trl") is not None:
        found |= with_trl(run, with_pieces)
    asked["optimizer"] = {"type": "AdamW", "params": {**adam, "torch_adam": True}}
    found |= resumed(run, "auto", 8, deepspeed=asked, keep="auto")
    asked["scheduler"] = {"type": "WarmupLR", "params": {}}
    found["errors"] = {
        "scheduler": error_of(lambda: run.trainer(deepspeed=asked, keep="auto")),
    }
    return found


def main(rank: int, port: int, corpus: Path, out: Path, scenario: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(PROCESSES),
        "LOCAL_WORLD_SIZE": str(PROCESSES),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # TRL reports what it runs, but not from CI.
        "CI": "1",
    }
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/store", rank=rank, world_size=PROCESSES
    )
    found = {"fsdp": fsdp, "deepspeed": deepspeed}[scenario](Run(corpus, out))
    (out / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        free_port = server.getsockname()[1]
    sys.exit(
        run_forked(
            PROCESSES,
            lambda rank: main(rank, free_port, Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]),
        )
    )
