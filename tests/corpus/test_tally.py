"""Counts of a conversion stay small and printable, whatever the records hold."""

from __future__ import annotations

from collections import Counter

from slap_stream.corpus.messages import DropReason
from slap_stream.corpus.tally import Tally


def test_reasons_are_bounded_and_printable() -> None:
    tally = Tally()
    for n in range(50):
        tally.drop(DropReason.UNKNOWN_ROLE, 0, n, f"r{n}\n\x1b[31m" + "x" * 500)
        tally.drop(DropReason.UNKNOWN_ROLE, 0, n, "r7\n\x1b[31m" + "x" * 500)
    assert len(tally.dropped) == 21
    assert tally.dropped.total() == 100
    assert tally.dropped["unknown role: others"] == 30
    assert all(name.isprintable() and len(name) < 100 for name in tally.dropped)
    twice = Tally.total([{"tally": tally.to_dict()}, {"tally": tally.to_dict()}])
    assert twice.dropped == Counter({name: 2 * n for name, n in tally.dropped.items()})
    other = Tally()
    other.drop(DropReason.UNKNOWN_ROLE, 1, 0, "another")
    other.drop(DropReason.NO_ASSISTANT, 1, 0)
    other.pass_over([f"field {n}" for n in range(500)], 2)
    tally.add_dropped(other)
    assert tally.dropped["unknown role: others"] == 31
    assert tally.dropped["no assistant turn"] == 1
    assert len(other.unused) == 201
    assert other.unused.total() == 1000
