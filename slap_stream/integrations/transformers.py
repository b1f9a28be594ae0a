"""SlapTrainer: Hugging Face's Trainer, on batches that are composed while the model trains."""

from __future__ import annotations

from slap_stream.integrations.mixin import SlapMixin


class SlapTrainer(SlapMixin):
    """A `Trainer` that decides which samples are worth a step; everything else is the Trainer's.

    The loss that is trained on is what the stock Trainer would make of the same batch, label
    smoothing, `compute_loss_func` and token counts over accumulated batches included. Beside it
    each sample's mean loss goes back to the loader, and a `LearnabilityProbe` steps along with the
    optimizer. Evaluation and prediction are the stock Trainer's.

    On several devices (one process each; DDP, FSDP2 or DeepSpeed) every process composes its part
    of the batches.

    A checkpoint holds the loader's state, of all ranks, in `slap_stream.state` (to be read with
    `slap_stream.core.state_bytes`), and `resume_from_checkpoint` goes on exactly, on as many
    devices or, with as large a global batch, on others; `ignore_data_skip` has no meaning here.
    Batches are always whole, as with `dataloader_drop_last`. `group_by_length` (transformers 5: the
    sampling strategy) deals the samples of an optimizer step by length, as the embeddings have it.
    With `ChatCollator(packing="padding_free")` there is no padding; a model whose samples would see
    each other is refused. The columns that a `ChatCollator` reads are never removed. The loader's
    metrics go to the reporters (TensorBoard, Weights & Biases) and to the caller's callbacks as
    `slap/...`, but neither to the console nor to `log_history`, which every checkpoint holds.

    Args:
        model: As for `Trainer`; a causal language model, or see `sample_losses`.
        args: As for `Trainer`; `per_device_train_batch_size` must be that of a `StreamingDataset`.
            What cannot be honoured is refused by name.
        data_collator: As for `Trainer`; makes a mapping with `labels`. None: a `ChatCollator` with
            the `processing_class`.
        train_dataset: A `datasets.Dataset` or `IterableDataset` of chats or texts, a path to
            JSON lines, Parquet or MDS shards, or what `slap_stream.prepare` returned: converted and
            embedded once, and found again. Or a `StreamingDataset`.
        eval_dataset: As for `Trainer`; or a path, as of a training set, or what `prepare` returned,
            which is read into memory. Also several by name.
        embeddings: Of a `StreamingDataset`, as for `SlapDataLoader`.
        corpus: Where other training sets are prepared; default `_slap_corpus` in the output_dir.
        slap_config: Settings; default `SlapConfig()`. `probe_fraction=0` switches the probe off.
        head: As for `LearnabilityProbe`.
        loss_fn: As for `LearnabilityProbe`.
        callbacks: As for `Trainer`.
        **options: Everything else that `Trainer` takes, which differs from version to version.

    Raises:
        TypeError: If the training set is of no kind that can be prepared.
        CorpusError: If it cannot be prepared.
        ConfigError: If settings contradict each other, or one of them cannot be honoured.
    """
