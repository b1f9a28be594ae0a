"""Fields under other names than the known ones: a map of names, and a guess at one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slap_stream.corpus.messages import CONTENT_FIELDS, ROLE_FIELDS
from slap_stream.errors import ConfigError

Groups = Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldMap:
    """Which fields of the data stand for which of the known names.

    Attributes:
        record: Known name -> name in the data, or a way into it (`translation.en`, `answers.0`).
        turn: The same for `role` and `content` of a turn.
        sources: Fields of a record that values are taken from, or from inside of.
        groups: Known names that are looked for: of lists, prompts, answers, contexts, documents.
    """

    record: Mapping[str, str]
    turn: Mapping[str, str]
    sources: frozenset[str]
    groups: Groups

    def to_dict(self) -> dict[str, str]:
        """As it was given."""
        return {**self.record, **self.turn}

    def name_of(self, name: str) -> str:
        """What a known name is called in the data."""
        return self.record.get(name, name)

    def apply(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """A record under the known names; what is in the way of these is left out."""
        return {
            **{name: value for name, value in record.items() if not self.hides(name)},
            **{name: found_at(record, source) for name, source in self.record.items()},
        }

    def apply_to_names(self, names: Iterable[str]) -> dict[str, str]:
        """The same for a record of which nothing but its names is known."""
        names = list(names)
        given = {
            name
            for name, source in self.record.items()
            if source in names or source.partition(".")[0] in names
        }
        return dict.fromkeys([*(name for name in names if not self.hides(name)), *given], "")

    def apply_to_turn(self, turn: Mapping[str, Any]) -> dict[str, Any]:
        """A turn under the known names."""
        hidden = {*self.turn.values(), *(ROLE_FIELDS if "role" in self.turn else ())}
        hidden |= set(CONTENT_FIELDS) if "content" in self.turn else set()
        return {
            **{name: value for name, value in turn.items() if name not in hidden},
            **{name: found_at(turn, source) for name, source in self.turn.items()},
        }

    def hides(self, name: str) -> bool:
        """Whether a field is not looked at under its own name."""
        return name in self.record or name in self.sources


# Usual names of what is said first and second, for a guess.
_ASKING = (
    *("question", "query", "prompt", "instruction", "problem", "user", "human", "request"),
    *("title", "source", "input", "context", "article", "document"),
)
_ANSWERING = (
    *("answer", "response", "output", "completion", "solution", "assistant", "target", "chosen"),
    *("reply", "summary", "highlights", "explanation", "rationale"),
)
# Of a turn.
_OF_A_TURN = ("role", "content")
_SPEAKERS = ("role", "from", "speaker", "author", "user", "name")
_SAID = ("content", "value", "text", "utterance", "message", "body")


def check_fields(
    fields: Any, known: Sequence[str], groups: Groups, choose: Callable[[Collection[str]], Groups]
) -> FieldMap | None:
    """A map as it was given, checked; None for none.

    Args:
        fields: As it was given; None for none.
        known: Names of a record that may be mapped.
        groups: Names of which one at most may be, since they stand for the same.
        choose: The known names that are looked for if these are mapped.

    Raises:
        ConfigError: If it is no map of names, or maps what is not known.
    """
    if fields is None:
        return None
    if not isinstance(fields, Mapping) or not all(
        isinstance(name, str) and isinstance(source, str) and source
        for name, source in fields.items()
    ):
        raise ConfigError(
            f"fields must map known names to names in the data, got {fields!r}; an example is "
            "{'instruction': 'question', 'output': 'answer'}."
        )
    unknown = sorted(set(fields) - {*known, *_OF_A_TURN})
    if unknown:
        cure = "; source_field names the source" if "source" in unknown else ""
        raise ConfigError(
            f"fields must map names out of {', '.join((*known, *_OF_A_TURN))}, got "
            f"{unknown[:5]!r}{cure}."
        )
    for group in groups:
        same = sorted(set(group) & set(fields))
        if len(same) > 1:
            raise ConfigError(
                f"fields must map one name of those that stand for the same, got {same!r}; leave "
                "out all but one."
            )
    if not fields:
        return None
    record = {name: fields[name] for name in sorted(fields) if name not in _OF_A_TURN}
    sources = {*record.values(), *(source.partition(".")[0] for source in record.values())}
    return FieldMap(
        record=record,
        turn={name: fields[name] for name in sorted(fields) if name in _OF_A_TURN},
        sources=frozenset(sources),
        groups=choose(record),
    )


def parse_map(text: str) -> dict[str, str]:
    """The map that a command line says as `instruction=question,output=answer`.

    Raises:
        ConfigError: If it is no such list.
    """
    fields: dict[str, str] = {}
    for pair in text.split(","):
        name, equals, source = (part.strip() for part in pair.partition("="))
        if not (name and equals and source) or name in fields:
            raise ConfigError(
                f"--map must be NAME=FIELD, or several with commas between, each name once, got "
                f"{text!r}; say --map instruction=question,output=answer, say."
            )
        fields[name] = source
    return fields


def found_at(record: Mapping[str, Any], source: str) -> Any:
    """What a record has under a name, or on a way into it; None for nothing."""
    if source in record:
        return record[source]
    value: Any = record
    for step in source.split("."):
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def guess(record: Mapping[str, Any]) -> dict[str, str]:
    """A map that might serve for records like this one; empty if nothing suggests itself."""
    if set(ROLE_FIELDS) & record.keys() and set(CONTENT_FIELDS) & record.keys():
        return {}  # one turn of a dialogue: a prompt and an answer are in no record
    texts, asked, answered = [], [], []
    for name, value in _flat(record):
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            return {"messages": name, **_guess_turn(value[0])}
        if isinstance(value, str) and value.strip():
            texts.append(name)
            last = name.rpartition(".")[2].lower()
            asked += [name] if any(word in last for word in _ASKING) else []
            answered += [name] if any(word in last for word in _ANSWERING) else []
    if len(texts) == 1:
        return {"text": texts[0]}
    if not texts:
        return {}
    answer = next((name for name in answered if name not in asked), (answered or texts[1:])[-1])
    prompt = next((name for name in (*asked, *texts) if name != answer), texts[0])
    return {"instruction": prompt, "output": answer}


def _guess_turn(turn: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, usual, known in (
        ("role", _SPEAKERS, ROLE_FIELDS),
        ("content", _SAID, CONTENT_FIELDS),
    ):
        given = [field for field in turn if field.lower() in usual]
        if given and not set(known) & set(turn):
            found[name] = given[0]
    return found


def _flat(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", entry) for inner, entry in value.items())
        else:
            yield str(name), value
