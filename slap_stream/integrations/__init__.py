"""Training loops of other libraries that slap_stream plugs into.

transformers.py    `SlapTrainer`: Hugging Face's Trainer
data_schedule.py   learning rates that follow the data, where the number of steps is not known
trainer_checks.py  arguments and data that a trainer refuses
"""

from __future__ import annotations

# What other folders may import, by module; tests/test_architecture.py holds it.
EXPORTS = {
    "transformers": ("SlapTrainer",),
}
