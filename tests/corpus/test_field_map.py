"""A map says what known names are called in the data; without one a guess is offered, not taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from slap_stream import convert
from slap_stream.corpus.field_map import guess, parse_map
from slap_stream.corpus.messages import DropReason, RecordDropped
from slap_stream.corpus.records import check_map, columns_to_read, has_known_shape, normalise
from slap_stream.errors import ConfigError, CorpusError
from slap_stream.shards.reader import iter_corpus

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
OTHER = {"q": "hi", "a": "yo", "text": "no", "messages": [{"role": "user", "content": "no"}]}


@pytest.mark.parametrize(
    ("record", "fields", "unused"),
    [
        # What is mapped counts before what has a known name.
        (OTHER, {"instruction": "q", "output": "a"}, ("messages", "text")),
        ({"prompt": "hi", "best": "yo"}, {"output": "best"}, ()),
        ({"prompt": "hi", "answer": "no", "best": "yo"}, {"answer": "best"}, ("answer",)),
        ({"translation": {"en": "hi", "de": "yo"}}, {"prompt": "translation.en",
         "answer": "translation.de"}, ()),
        ({"q": "hi", "answers": {"text": ["yo", "yes"]}}, {"prompt": "q",
         "answer": "answers.text.0"}, ()),
        ({"a.b": "hi", "a": {"b": "no"}, "c": "yo"}, {"prompt": "a.b", "answer": "c"}, ()),
        ({"talk": [{"who": "Human", "says": "hi"}, {"who": "bot", "says": "yo", "at": 1}]},
         {"messages": "talk", "role": "who", "content": "says"}, ("at of a turn",)),
        ({"messages": [{"role": "gpt", "text": "no", "from": "human", "says": "hi"}, HI[1]
                       | {"from": "gpt", "says": "yo"}]},
         {"role": "from", "content": "says"}, ()),
        # A name that is given to nothing that a conversation is made of.
        ({"messages": HI, "uid": "7", "extra": 1}, {"id": "uid"}, ("extra",)),
    ],
)  # fmt: skip
def test_mapped_fields_make_the_record(
    record: dict[str, Any], fields: dict[str, str], unused: tuple[str, ...]
) -> None:
    mapped = check_map(fields)
    assert has_known_shape(record, mapped)
    found = normalise(record, fields=mapped)
    assert found.messages == HI
    assert found.unused == unused
    assert found.id == record.get("uid")
    read = columns_to_read(mapped, None)
    assert normalise({n: v for n, v in record.items() if n in read}, fields=mapped).messages == HI


def test_what_a_map_does_not_find_is_dropped_by_its_own_name() -> None:
    mapped = check_map({"prompt": "q", "answer": "a.b"})
    with pytest.raises(RecordDropped, match=r"field without a value: a\.b"):
        normalise({"q": "hi", "a": {"c": 1}}, fields=mapped)
    with pytest.raises(RecordDropped) as dropped:
        normalise({"prompt": "hi", "answer": "yo"}, fields=mapped)
    assert dropped.value.reason is DropReason.UNKNOWN_SHAPE


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["a"], r"fields must map known names to names in the data, got \['a'\]; an example is"),
        ({"prompt": ""}, "got {'prompt': ''}"),
        ({"prompt": 3}, "got {'prompt': 3}"),
        ({"query2": "a"}, r"names out of id, messages, .*, role, content, got \['query2'\]\."),
        ({"source": "a"}, r"got \['source'\]; source_field names the source"),
        ({"prompt": "a", "question": "b"}, r"stand for the same, got \['prompt', 'question'\]"),
    ],
)
def test_maps_that_are_none_are_refused(fields: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_map(fields)


def test_the_command_line_says_a_map_in_one_word() -> None:
    assert parse_map("instruction=q, output=a.b") == {"instruction": "q", "output": "a.b"}
    for wrong in ("", "instruction", "=q", "output=", "id=a,id=b", "id=a,"):
        with pytest.raises(ConfigError, match=r"--map must be NAME=FIELD, .*, got '"):
            parse_map(wrong)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"question": "a", "solution": "b"}, "instruction=question,output=solution"),
        ({"final_answer": "b", "problem": "a"}, "instruction=problem,output=final_answer"),
        ({"left": "a", "right": "b"}, "instruction=left,output=right"),
        (
            {"translation": {"en": "a", "de": "b"}},
            "instruction=translation.en,output=translation.d",
        ),
        ({"body": "a", "stars": 3}, "text=body"),
        ({"dialog": [{"from": "x", "value": "y"}]}, "messages=dialog"),
        ({"talk": [{"speaker": "x", "utterance": "y"}]}, "messages=talk,role=speaker,content=utt"),
        ({"role": "user", "content": "a"}, ""),
        ({"stars": 3}, ""),
        ({}, ""),
    ],
)
def test_a_record_of_unknown_shape_is_refused_with_a_map_that_may_serve(
    tmp_path: Path, record: dict[str, Any], expected: str
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(CorpusError, match="must have one of the known shapes") as refused:
        convert(tmp_path / "a.jsonl", tmp_path / "out")
    assert ("--map" in str(refused.value)) == bool(expected)
    assert expected in str(refused.value)
    assert str(refused.value).count("\n") == 0
    found = guess(record)
    if found:
        check_map(found)
        assert has_known_shape(record, check_map(found))


def test_a_corpus_is_made_by_its_map_whatever_holds_the_records(tmp_path: Path) -> None:
    records = [{"json": {"q": f"hi {n}", "a": "yo"}, "__key__": str(n)} for n in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    # As `datasets` gives what it reads of WebDataset.
    stream = IterableDataset.from_generator(lambda rows: iter(rows), gen_kwargs={"rows": records})
    fields = {"prompt": "json.q", "answer": "json.a"}
    made = []
    for number, dataset in enumerate([tmp_path / "a.jsonl", Dataset.from_list(records), stream]):
        report = convert(dataset, tmp_path / f"{number}", fields=fields)
        assert (report.num_samples, report.unused) == (20, {"__key__": 20})
        made.append(
            sorted(s["messages"][0]["content"] for s in iter_corpus(tmp_path / f"{number}"))
        )
    assert made[0] == made[1] == made[2] == sorted(f"hi {n}" for n in range(20))
    # Another map is another corpus.
    with pytest.raises(CorpusError, match="out must be new"):
        convert(tmp_path / "a.jsonl", tmp_path / "0", fields={"text": "json.q"})
