"""One run: the base model fine-tuned on the batches of one arm, and what came of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from streaming import StreamingDataset
from torch.nn.functional import cross_entropy

from slap_stream import (
    EmbeddingStore,
    LearnabilityProbe,
    SlapDataLoader,
)
from slap_stream.embeddings.rows import ArrayStore
from slap_stream.probe.head import find_body, find_head, hidden_of
from slap_stream.shards.opening import one_at_a_time
from slap_stream.text.collate import ChatCollator
from tools.bench.selection.corpora import KINDS, Corpus, Workshop
from tools.bench.selection.evidence import evidence_by_kind
from tools.bench.selection.generation import generation_scores
from tools.bench.selection.schedule import Arm, Preset, RunKey, config_of, rate
from tools.bench.selection.scoring import encoded, options_of, rank_classification
from tools.bench.selection.tasks import MIXTURES, Condition, split_training

Batch = dict[str, torch.Tensor]
IGNORED = -100
EVALUATION_BATCH = 64
# Records of a target set, and after how many batches its gradient is measured again.
TARGET_SIZE, TARGET_EVERY = 32, 8


def run(workshop: Workshop, key: RunKey, arm: Arm) -> dict[str, Any]:
    """Fine-tune once and evaluate.

    Returns:
        `heldout`: mean loss by source; `losses`: that of each held-out record; `written`:
        generation scores by source; `curve`: (samples, mean over sources of the loss) along the
        run; `trained` and `offered`: counts by kind; `copied_records`: records that near-copies
        were made of; costs in tokens and seconds; the loader's metrics.
    """
    preset, condition = workshop.preset, Condition.of(key.condition)
    whole = workshop.corpus(condition, key.seed)
    corpus = whole
    if arm.choice is not None:
        corpus = workshop.chosen(condition, key.seed, arm.choice, arm.share, arm.aim)
    tokenizer = workshop.tokenizer()
    heldout = _heldout_batches(workshop, condition, tokenizer)
    dataset = _open_dataset(corpus, preset)
    store, judged = _store(workshop, corpus, arm, key)
    loader = SlapDataLoader(
        dataset,
        batch_size=preset.batch_size,
        embeddings=store,
        config=config_of(arm, key.keep, key.seed),
        collate_fn=ChatCollator(tokenizer),
    )
    torch.manual_seed(key.seed)
    model = workshop.base_model().to(preset.device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=key.learning_rate, weight_decay=0.01, fused=True
    )
    probe = LearnabilityProbe(model, loader, optimizer=optimizer) if arm.probe else None

    offered = np.bincount(whole.kind, minlength=len(KINDS)) * preset.epochs
    trained = np.zeros(len(corpus.kind), np.int64)
    curve = [(0, _mean(_means(_evaluate(model, heldout, preset))))]
    seconds = dict.fromkeys(("train", "compose", "probe"), 0.0)
    tokens = samples = steps = shown = 0
    targets = _target_batches(workshop, condition, tokenizer) if arm.target else []
    due = [part / preset.evaluations for part in range(1, preset.evaluations)]
    visits = 1.0 if arm.equal_steps else arm.visits
    every = len(whole.kind) // preset.batch_size * preset.epochs
    most = None if visits is None else round(visits * every)
    for done, batch in _batches(loader, preset.epochs, most, seconds):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = key.learning_rate * rate(done)
        weights = loader.loss_weights(batch["sample_id"]) if arm.probe else None
        losses, count = _step(model, optimizer, batch, preset, weights)
        tokens += count
        seconds["train"] += time.perf_counter() - began
        trained[batch["sample_id"].numpy()] += 1
        samples += len(losses)
        if probe is not None:
            began = time.perf_counter()
            loader.observe(batch["sample_id"], losses)
            if targets and steps % TARGET_EVERY == 0:
                loader.sampler.set_target(probe.mean_sketch(targets))
                shown += TARGET_SIZE
            probe.step()
            steps += 1
            seconds["probe"] += time.perf_counter() - began
        if due and done >= due[0]:
            due.pop(0)
            curve.append((samples, _mean(_means(_evaluate(model, heldout, preset)))))
    losses_by_source = _evaluate(model, heldout, preset)
    final = _means(losses_by_source)
    curve.append((samples, _mean(final)))
    copied = whole.group >= 0
    return {
        **key.to_dict(),
        "heldout": final,
        "losses": {name: losses.round(4).tolist() for name, losses in losses_by_source.items()},
        "loss": _mean(final),
        "written": generation_scores(model, tokenizer, workshop.heldout(condition.mixture), preset),
        "curve": curve,
        "candidates": int(offered.sum()),
        "samples": samples,
        "offered": dict(zip(KINDS, offered.tolist(), strict=True)),
        "trained": {
            kind: int(trained[corpus.kind == number].sum()) for number, kind in enumerate(KINDS)
        },
        "copied_records": len(np.unique(whole.group[copied])),
        "tokens": tokens,
        "prepared": corpus.prepared + judged,
        "auc": {
            kind: round(each.auc, 3)
            for kind, each in evidence_by_kind(store, corpus).items()
            if kind != "clean" and not np.isnan(each.auc)
        },
        "ranked": _ranked(workshop, condition, model, tokenizer),
        "probed": shown + int(loader.metrics().get("probe_samples", 0.0)),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "metrics": {name: round(value, 4) for name, value in loader.metrics().items()},
    }


def _batches(
    loader: SlapDataLoader, epochs: int, most: int | None, seconds: dict[str, float]
) -> Iterator[tuple[float, Batch]]:
    """Batches of so many epochs, or so many batches, each with the share of the run then done."""
    taken = 0
    for epoch in itertools.count():
        if epoch == epochs and most is None:
            return
        batches = iter(loader)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            seconds["compose"] += time.perf_counter() - began
            if batch is None:
                break
            taken += 1
            yield ((epoch + loader.progress) / epochs if most is None else taken / most), batch
            if taken == most:
                return


def _ranked(
    workshop: Workshop, condition: Condition, model: Any, tokenizer: Any
) -> dict[str, float]:
    """Percentage of held-out records whose answer is the likeliest of its template's, by task."""
    preset, result = workshop.preset, {}
    for task in set(preset.ranked) & set(MIXTURES[condition.mixture]):
        known, other = split_training(workshop.data, task)
        held = [r for r in workshop.heldout(condition.mixture) if r["source"] == task]
        options = options_of([*known, *other])
        share, count = rank_classification(held, options, model, tokenizer, preset)
        if count:
            result[task] = share
    return result


def _open_dataset(corpus: Corpus, preset: Preset) -> StreamingDataset:
    """The corpus's dataset; several runs of the benchmark share a machine."""
    with one_at_a_time():
        return StreamingDataset(local=str(corpus.path), batch_size=preset.batch_size)


def _store(workshop: Workshop, corpus: Corpus, arm: Arm, key: RunKey) -> tuple[Any, int]:
    """The corpus's embeddings, and the tokens that a model has read for them; an oracle's say what
    is so instead of what is likely."""
    condition = Condition.of(key.condition)
    if arm.judged:
        path, read = workshop.judged_store(condition, key.seed)
        return EmbeddingStore(path), read
    if arm.aim is not None and arm.choice is None:
        return EmbeddingStore(workshop.aimed_store(condition, key.seed, arm.aim)), 0
    if arm.reference:
        return EmbeddingStore(workshop.reference_store(condition, key.seed)), 0
    store = EmbeddingStore(corpus.path / "embeddings.zarr")
    if not arm.knows:
        return store, 0
    rows = store.read(0, store.shape[0])
    names = [*store.feature_names]
    feature = rows.feature.astype(np.float32)
    feature[:, names.index("mismatch")] = corpus.is_of(arm.knows)
    known = ArrayStore(
        rows.embedding,
        lengths=rows.length,
        features=feature,
        sources=rows.source,
        feature_names=names,
        source_names=store.source_names,
    )
    return known, 0


def _step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    preset: Preset,
    weights: torch.Tensor | None,
) -> tuple[torch.Tensor, int]:
    """One optimizer step; (batch,) losses and the tokens that went through the model."""
    losses = torch.zeros(len(batch["input_ids"]))
    tokens = 0
    for rows, part in _micro_batches(batch, preset.micro_batches):
        some = _losses(model, part, preset)
        weighted = some if weights is None else some * weights[rows].to(some)
        (weighted.sum() / len(losses)).backward()
        losses[rows] = some.detach().float().cpu()
        tokens += part["input_ids"].numel()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return losses, tokens


def _micro_batches(batch: Batch, count: int) -> Iterator[tuple[torch.Tensor, Batch]]:
    """Rows of similar length together: most of a padded batch would be padding."""
    length = batch["attention_mask"].sum(1)
    for rows in torch.argsort(length, stable=True).tensor_split(count):
        width = int(length[rows].max())
        names = ("input_ids", "attention_mask", "labels")
        yield rows, {name: batch[name][rows, :width] for name in names}


def _losses(model: Any, batch: Batch, preset: Preset) -> torch.Tensor:
    """(batch,) mean loss over the supervised tokens of each sample.

    As `per_sample_loss` has it, but the head reads the supervised tokens alone: with a vocabulary
    of 49,000 it is a fifth of the model, and two tokens of three are not supervised.
    """
    moved = {name: value.to(preset.device) for name, value in batch.items()}
    body, head = find_body(model), find_head(model, None)
    targets = moved["labels"][:, 1:]
    on = targets != IGNORED
    with preset.autocast():
        assert body is not None
        output = body(input_ids=moved["input_ids"], attention_mask=moved["attention_mask"])
        logits = head(hidden_of(output)[:, :-1][on])
    each = cross_entropy(logits.float(), targets[on], reduction="none")
    total = each.new_zeros(len(on)).index_add(0, on.nonzero()[:, 0], each)
    return total / on.sum(1).clamp(min=1)


def _heldout_batches(
    workshop: Workshop, condition: Condition, tokenizer: Any
) -> list[tuple[NDArray[np.str_], Batch]]:
    """Held-out records by source and length, so that batches hold little padding."""
    rows = encoded(workshop.heldout(condition.mixture), tokenizer, workshop.preset.max_tokens)
    rows.sort(key=lambda row: len(row[1]["input_ids"]))
    collate = ChatCollator(tokenizer)
    parts = [rows[at : at + EVALUATION_BATCH] for at in range(0, len(rows), EVALUATION_BATCH)]
    return [
        (np.array([source for source, _ in part]), collate([tokens for _, tokens in part]))
        for part in parts
    ]


def _target_batches(workshop: Workshop, condition: Condition, tokenizer: Any) -> list[Batch]:
    """Clean records that no run is trained or tested on, in the tasks' shares."""
    rows = encoded(
        workshop.target(condition.mixture, TARGET_SIZE), tokenizer, workshop.preset.max_tokens
    )
    return [ChatCollator(tokenizer)([tokens for _, tokens in rows])]


@torch.no_grad()
def _evaluate(
    model: Any, batches: list[tuple[NDArray[np.str_], Batch]], preset: Preset
) -> dict[str, NDArray[np.float64]]:
    """Losses of each source's held-out records, in the same order for every model."""
    model.eval()
    losses = np.concatenate([_losses(model, b, preset).double().cpu().numpy() for _, b in batches])
    model.train()
    sources = np.concatenate([names for names, _ in batches])
    return {str(name): losses[sources == name] for name in np.unique(sources)}


def _means(losses: dict[str, NDArray[np.float64]]) -> dict[str, float]:
    return {name: float(of.mean()) for name, of in losses.items()}


def _mean(by_source: dict[str, float]) -> float:
    return float(np.mean(list(by_source.values())))
