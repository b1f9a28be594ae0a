"""Training loops and datasets of other libraries that slap_stream plugs into.

prepare.py            `prepare`: a Hugging Face dataset, or files, to a corpus with embeddings
first_rank.py         work that one rank does while the others wait
training_set.py       whatever a Trainer is given to train on, as a `StreamingDataset`
evaluation_set.py     evaluation sets that are named by their path
transformers.py       `SlapTrainer`: Hugging Face's Trainer
trl.py                `SlapSFTTrainer`: TRL's SFTTrainer
trl_datasets.py       datasets as TRL reads them
mixin.py              `SlapMixin`: what makes any Trainer choose its batches
trainer_loader.py     the loader that a Trainer draws from
trainer_forward.py    each sample's loss, from the forward of the training step
trainer_callbacks.py  what happens at moments that only a Trainer's callbacks are told of
trainer_checks.py     arguments and data that a Trainer is refused for
zero_state.py         what DeepSpeed's optimizers know of a parameter, whole
data_schedule.py      learning rates that follow the data, where the number of steps is not known
"""

from __future__ import annotations

# What other folders may import, by module; tests/test_architecture.py holds it.
EXPORTS = {
    "prepare": ("Prepared", "prepare"),
    "mixin": ("SlapMixin",),
    "transformers": ("SlapTrainer",),
    "trl": ("SlapSFTTrainer",),
}
