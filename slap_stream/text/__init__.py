"""Chats and texts of one sample: which tokens are learnt, and what is prompt and what target.

in   messages, plain texts or token ids of one sample
out  token ids with a mask of what is learnt; prompt and target as text; padded batches

chat.py      messages to token ids, through a tokenizer's chat template
turns.py     where a template puts what the assistant says, to the character
template.py  a tokenizer's chat template, and what it writes around turns
traced.py    strings that know which message they are of, whatever a template does to them
collate.py   `ChatCollator`: samples of a corpus to a padded batch
sample.py    `TextSample`: one sample as prompt and target, for whoever embeds it
"""

from __future__ import annotations

# What other folders may import, by module; tests/test_architecture.py holds it.
EXPORTS = {
    "chat": (
        *("ATTENTION", "Encoded", "Truncate", "check_truncate", "cut", "encode"),
        "without_padding",
    ),
    "template": ("DEFAULT_CHAT_TEMPLATE", "REASONING_FIELDS", "TurnsError"),
    "turns": ("LEARN_FIELDS", "is_learnt", "tools_of"),
    "collate": ("ChatCollator",),
    "sample": ("TextSample", "from_messages", "from_text", "from_tokens"),
}
