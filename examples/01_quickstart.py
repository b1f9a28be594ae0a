"""Train a small language model three times, and see what slap_stream spares it.

    python examples/01_quickstart.py                                # no download, no argument
    python examples/01_quickstart.py --corpus my_data.jsonl.gz      # the same on your data

The corpus is the documentation of Python's libraries as a crawler finds it, a page for each public
name. Names are exported again and methods inherited, so that many pages say the same. What comes
out is printed as it is, also when slap loses. A report shows what slap has pruned, and why.
"""

from __future__ import annotations

import inspect
import json
import math
import random
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from streaming import StreamingDataset
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slap_stream import ChatCollator, LearnabilityProbe, SlapConfig, SlapDataLoader, per_sample_loss
from slap_stream.cli import convert, embed, report
from slap_stream.cli.command_line import CommandLine, ended, to_write, whole
from slap_stream.errors import CorpusError

LIBRARIES = ("numba", "numpy", "scipy", "torch", "transformers", "zarr")
BATCH_SIZE, EPOCHS, LEARNING_RATE, MAX_TOKENS = 16, 4, 5e-3, 128
MARKER = ".quickstart"  # Says that a folder is a quickstart's own and may be overwritten.
Record = dict[str, Any]


def docstrings(count: int, seed: int) -> Iterator[Record]:
    """Ask what `count` public names are for, as many of each library."""
    with warnings.catch_warnings(action="ignore"):  # Of names that libraries would rather not show.
        for library in LIBRARIES:
            names = list(public_names(library))
            random.Random(seed).shuffle(names)
            asked = (question(library, *name) for name in names)
            yield from islice(filter(None, asked), count // len(LIBRARIES))


def public_names(library: str) -> Iterator[tuple[str, Any]]:
    """Classes, methods and functions of what is loaded, under every name that they have."""
    paths = sorted(path for path in sys.modules if f"{path}.".startswith(f"{library}."))
    for path in (path for path in paths if "._" not in path):
        for name, value in sorted(vars(sys.modules[path]).items()):
            own = str(getattr(value, "__module__", "")).startswith(library)
            if own and not name.startswith("_"):
                yield f"{path}.{name}", value
                for method in dir(value) if isinstance(value, type) else ():
                    if not method.startswith("_"):
                        yield f"{path}.{name}.{method}", getattr(value, method, None)


def question(library: str, path: str, value: Any) -> Record | None:
    """A chat about one name; the answer is the first paragraph of its docstring."""
    answer = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    if not ((isinstance(value, type) or inspect.isroutine(value)) and 60 <= len(answer) <= 200):
        return None
    try:
        signature = ", ".join(inspect.signature(value).parameters)[:40]
    except (TypeError, ValueError):  # Compiled code need not say.
        signature = "..."
    prompt = f"What does {path.rpartition('.')[2]}({signature}) do?"
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"id": path, "source": library, "messages": messages}


def answer_of(record: Record) -> str:
    """What a model is to say."""
    return " ".join(t["content"] for t in record["messages"] if t["role"] in ("assistant", "text"))


def phrases(record: Record) -> set[str]:
    """All four words in a row of the answer."""
    words = answer_of(record).lower().split()
    return {" ".join(words[start : start + 4]) for start in range(max(1, len(words) - 3))}


def split(records: list[Record], count: int, seed: int) -> tuple[list[Record], list[Record]]:
    """Draw records to train on, and to hold out: most phrases of their answers are new."""
    random.Random(seed).shuffle(records)
    count = min(count, len(records) * 3 // 4)
    seen = {phrase for record in records[:count] for phrase in phrases(record)}
    heldout = []
    for record in records[count:]:
        if 2 * len(phrases(record) & seen) < len(phrases(record)):
            heldout.append(record)
            seen |= phrases(record)
    if len(heldout) < 50:
        raise CorpusError(
            f"corpus must leave 50 new answers to hold out, got {len(heldout)}; use a larger one."
        )
    return records[:count], heldout[:400]


def train_tokenizer(records: list[Record], path: Path) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer of the training texts."""
    texts = [turn["content"] for record in records for turn in record["messages"]]
    special = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    core = ByteLevelBPETokenizer()
    core.train_from_iterator(texts, vocab_size=1024, special_tokens=special, show_progress=False)
    core.save(file := f"{path}.json")
    fast = PreTrainedTokenizerFast(tokenizer_file=file, eos_token="<|end|>", pad_token="<|pad|>")
    fast.save_pretrained(path)
    return fast


def command(tool: Any, *arguments: str | Path | int) -> None:
    """Run a command-line tool of slap_stream in this process, and show it as one would type it."""
    print(f"$ slap-{tool.__name__.rpartition('.')[2]} {' '.join(map(str, arguments))}", flush=True)
    if status := tool.main([str(argument) for argument in arguments]):
        sys.exit(status)


def samples_of(corpus: Path) -> list[Record]:
    """All samples of a small corpus."""
    dataset = StreamingDataset(local=str(corpus), batch_size=BATCH_SIZE)
    return [dataset[index] for index in range(dataset.num_samples)]


def forward(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(batch,) mean loss over the supervised tokens of each sample."""
    batch = {name: value.to(model.device) for name, value in batch.items()}
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return per_sample_loss(output.logits, batch["labels"])


def train(corpus: Path, tokenizer: Any, config: SlapConfig, heldout: Any, run_dir: Path) -> Any:
    """What your own loop looks like. Returns held-out losses, and each epoch's sample ids."""
    loader = SlapDataLoader(
        StreamingDataset(local=str(corpus), batch_size=BATCH_SIZE),
        batch_size=BATCH_SIZE,
        embeddings=corpus / "embeddings.zarr",
        config=config,
        collate_fn=ChatCollator(tokenizer),
        run_dir=run_dir,  # A log, for slap-report.
    )
    torch.manual_seed(config.seed)
    shape = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=176,
        num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=True)  # fmt: skip
    model = LlamaForCausalLM(shape).to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)

    def rate(_: int) -> float:
        # How many steps keep="auto" comes to is not known before; how far the run is, always is.
        done = loader.epochs_done / EPOCHS
        return min(1.0, 0.02 + 20 * done) * (1.0 + math.cos(math.pi * done)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    probe = LearnabilityProbe(model, loader, optimizer=optimizer)
    trained: list[list[int]] = [[] for _ in range(EPOCHS)]
    for epoch in trained:
        for batch in loader:
            losses = forward(model, batch)
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loader.observe(batch["sample_id"], losses)
            probe.step()
            schedule.step()
            epoch += batch["sample_id"].tolist()
        with torch.no_grad():  # The model has no dropout to be switched off.
            found = torch.cat([forward(model, batch) for batch in heldout])
        loader.note(held_out_loss=found.mean().item())
    return found, trained


def run(given: Path | None, count: int, seed: int, out: Path) -> None:
    """Records -> shards and embeddings -> three runs -> what came out."""
    if given is None:
        records = list(docstrings(3 * count, seed))  # Copies cannot be held out.
    else:
        command(convert, given, out / "records", "--quiet")
        records = [sample | {"id": str(n)} for n, sample in enumerate(samples_of(out / "records"))]
    records, others = split(records, count, seed)
    print(f"{len(records):,} records to train on, {len(others)} held out: no copies of these")
    tokenizer = train_tokenizer(records, out / "tokenizer")
    for name, part in (("train", records), ("heldout", others)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
        command(convert, out / f"{name}.jsonl", out / name, "--tokenizer", out / "tokenizer",
                "--max-length", MAX_TOKENS, "--shard-bytes", 100_000, "--quiet")  # fmt: skip
    command(embed, out / "train", "--quiet")

    heldout = samples_of(out / "heldout")
    batches = [ChatCollator(tokenizer)(heldout[i : i + 50]) for i in range(0, len(heldout), 50)]
    by_id = {record["id"]: answer_of(record) for record in records}
    answers = [by_id[sample["id"]] for sample in samples_of(out / "train")]
    keep, taught, losses = 1.0, {}, {}
    print(f"\n{'trained on':12}{'held-out loss':>14}{'samples':>9}{'copies':>8}{'seconds':>9}")
    for name in ("everything", "slap", "uniform"):
        # Uniform batches need no answers from the model, and so they do not pay for any.
        uniform = SlapConfig(policy="uniform", keep=keep, probe_fraction=0.0, seed=seed)
        config = SlapConfig(keep="auto", seed=seed) if name == "slap" else uniform
        start = time.perf_counter()
        losses[name], epochs = train(out / "train", tokenizer, config, batches, out / name)
        seconds = time.perf_counter() - start
        taught[name] = Counter(answers[index] for epoch in epochs for index in epoch)
        samples = taught[name].total()
        copies = 1.0 - sum(len({answers[index] for index in epoch}) for epoch in epochs) / samples
        keep = samples / (EPOCHS * len(answers))  # Of uniform batches as many as of slap's.
        print(f"{name:12}{losses[name].mean():14.3f}{samples:9,}{copies:8.0%}{seconds:9.1f}")
    print("(copies: answers seen before in the epoch; ±: 95 % over records, seeds vary more)\n")
    for name in ("everything", "uniform"):
        gap = losses["slap"] - losses[name]
        print(f"slap against {name}: {gap.mean():+.3f} ± {1.96 * gap.std() / len(gap) ** 0.5:.3f}")
    print("\neverything   slap   uniform   how often each trained on an answer")
    for text, times in taught["everything"].most_common(4):
        print(f"{times:10,}{taught['slap'][text]:7,}{taught['uniform'][text]:10,}   {text[:60]}")
    print("\nWhat slap has pruned, and why:")
    command(report, out / "slap", "--quiet")
    print(f"Open {out / 'slap' / '_slap_report.html'} in a browser.")


def main() -> int:
    """Read the command line and run; nothing of the user's is ever overwritten."""
    line = CommandLine(description=__doc__.splitlines()[0] if __doc__ else None)
    line.add_argument("--corpus", type=Path, help="JSONL of your own; default: docstrings")
    line.add_argument("--samples", type=whole(100), default=4_000, help="records to train on")
    line.add_argument("--seed", type=whole(0), default=0)
    line.add_argument("--out", type=to_write, default=Path("runs/quickstart"))
    arguments = line.parse_args()
    given, out = arguments.corpus, arguments.out
    if given is not None and (not given.is_file() or out.resolve() in given.resolve().parents):
        line.error(f"--corpus must be a file and not in --out, which is overwritten, got {given}")
    if out.exists() and not (out / MARKER).exists():
        line.error(f"--out must be new or of an earlier quickstart, got {out}; it is overwritten")
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARKER).touch()
    torch.set_num_threads(1)  # For a model this small more threads bring little.
    run(given, arguments.samples, arguments.seed, out)
    return 0


if __name__ == "__main__":
    sys.exit(ended(Path(__file__).name, main))
