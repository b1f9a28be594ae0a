"""Data of the examples: questions about the Python code of this very installation, a split of
them, and a tokenizer.

Every function and class with a docstring gives one record of one of four kinds, which is also
its source: `explain` (code -> docstring), `purpose` (class outline -> docstring), `signature`
(docstring -> signature) and `implement` (signature and docstring -> body). Nothing is cleaned:
libraries copy code from each other, and that is the redundancy that a sampler is up against.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import random
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from slap_stream.corpus.inputs import cut, find_inputs
from slap_stream.corpus.readers import read
from slap_stream.corpus.records import COLUMNS, RecordDropped, normalise
from slap_stream.errors import CorpusError
from slap_stream.text.chat import DEFAULT_CHAT_TEMPLATE

Record = dict[str, Any]
MAX_FILE_BYTES = 200_000
MAX_CODE_CHARACTERS = 220
SHINGLE_WORDS = 8
FEW_WORDS = 4


def docstring_records(count: int, seed: int) -> list[Record]:
    """Ask about `count` functions and classes of files drawn from all that are installed."""
    files: list[Path] = []
    for root in (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")):
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).parts
            if not {"site-packages", "test", "tests"} & set(parts):
                files.append(path)
    files.sort()
    random.Random(seed).shuffle(files)
    # Syntax trees are many objects and no cycles: the collector would take most of the time.
    gc.disable()
    try:
        questions = islice(_questions(files), count)
        return [_record(number, *question) for number, question in enumerate(questions)]
    finally:
        gc.enable()


def _record(number: int, source: str, prompt: str, answer: str) -> Record:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"id": f"doc-{number}", "source": source, "messages": messages}


def read_records(path: Path) -> list[Record]:
    """Records of a file in any format and shape that slap-convert reads; bad ones are left out."""
    records: list[Record] = []
    for entry in find_inputs([path]):
        for piece in cut(entry):
            for fields in read(piece, COLUMNS):
                try:
                    record = normalise(fields)
                except RecordDropped:
                    continue
                records.append(
                    {
                        "id": f"record-{len(records)}",
                        "source": record.source or entry.stem,
                        "messages": record.messages,
                    }
                )
    return records


def _questions(files: Sequence[Path]) -> Iterator[tuple[str, str, str]]:
    for path in files:
        if path.stat().st_size > MAX_FILE_BYTES:
            continue
        source = path.read_bytes()
        try:
            with warnings.catch_warnings():
                # Compiling old code warns of its escapes; that is not this script's business.
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, ValueError):
            # Templates and code of other Python versions lie about in site-packages.
            continue
        lines = source.decode(errors="replace").splitlines()
        pending: list[ast.AST] = [tree]
        while pending:
            node = pending.pop()
            # Bodies of modules and classes only: functions inside functions make poor questions.
            if isinstance(node, ast.Module | ast.ClassDef):
                pending.extend(reversed(node.body))
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                question = _question(node, lines)
                if question is not None:
                    yield question


def _question(
    node: ast.FunctionDef | ast.ClassDef, lines: Sequence[str]
) -> tuple[str, str, str] | None:
    docstring = ast.get_docstring(node)
    summary = " ".join(docstring.split("\n\n")[0].split()) if docstring else ""
    if not 20 <= len(summary) <= 240:
        return None
    body = node.body[1:]
    if isinstance(node, ast.ClassDef):
        methods = [item.name for item in body if isinstance(item, ast.FunctionDef)]
        outline = f"class {node.name}: {', '.join(methods)}"[:MAX_CODE_CHARACTERS]
        return "purpose", f"What is this Python class for?\n{outline}", summary
    code = "\n".join(lines[body[0].lineno - 1 : body[-1].end_lineno][:8]) if body else ""
    code = textwrap.dedent(code)[:MAX_CODE_CHARACTERS].strip()
    signature = f"def {node.name}({ast.unparse(node.args)}):"
    # The name decides the kind, so that copies of a function ask the same question.
    kind = hashlib.sha256(node.name.encode()).digest()[0] % 3
    if kind == 0 and code:
        return "explain", f"What does this Python function do?\n{signature}\n{code}", summary
    if kind == 1 and code:
        return "implement", f"Write the body of\n{signature}\n{summary}", code
    return "signature", f"Write the signature of a Python function.\n{summary}", signature


def split(
    records: Sequence[Record], *, num_train: int, num_heldout: int, seed: int
) -> tuple[list[Record], list[Record]]:
    """Draw a training set, and a held-out set that shares nothing with it.

    A record is not held out if more than half of its 8-word sequences occur in the training set
    or in what was held out before, nor if its answer does and is more than a few words long.

    Raises:
        CorpusError: If too few records are left to be held out.
    """
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    num_train = min(num_train, len(records) * 4 // 5)
    train = [records[index] for index in order[:num_train]]
    seen = {shingle for record in train for shingle in _shingles(record)}
    answers = {answer_of(record) for record in train}
    heldout: list[Record] = []
    for index in order[num_train:]:
        shingles, answer = _shingles(records[index]), answer_of(records[index])
        told = answer in answers and len(answer.split()) > FEW_WORDS
        if not told and len(shingles & seen) * 2 <= len(shingles):
            heldout.append(records[index])
            seen |= shingles
            answers.add(answer)
        if len(heldout) == num_heldout:
            return train, heldout
    if len(heldout) < 50:
        raise CorpusError(
            f"the corpus must leave at least 50 records to hold out, got {len(heldout)} of "
            f"{len(records)} that are no near-copies of training records; use a larger corpus."
        )
    return train, heldout


def _shingles(record: Record) -> set[int]:
    text = " ".join(message["content"] for message in record["messages"])
    words = text.lower().split()
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return {hash(tuple(words[start : start + SHINGLE_WORDS])) for start in range(last)}


def train_tokenizer(records: list[Record], path: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the training texts, with a chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    roles = ["<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<|end|>", "<|pad|>", *roles],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((m["content"] for r in records for m in r["messages"]), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    return tokenizer


def answer_of(record: Record) -> str:
    """What the assistant says in a record, on one line, in lower case."""
    said = [turn["content"] for turn in record["messages"] if turn["role"] == "assistant"]
    return " ".join(" ".join(said).lower().split())
