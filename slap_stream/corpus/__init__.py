"""Records of any known shape -> one shuffled corpus of MDS shards.

in   JSON, tables, datasets saved to disk or loaded
out  shards, index.json and corpus.json in one directory

convert.py     `convert`: the stages below, in order; goes on where it was cut off
report.py      what it did, also as corpus.json keeps it
inputs.py      which files there are, of what kind, and in which pieces they are read
peeking.py     their first records, before all work
opening.py     a file of them, opened wherever it lies
readers.py     a piece of an input, row by row
json_rows.py   JSON: a record a line, or in any other layout
tables.py      Parquet, Arrow, Feather, CSV, TSV
loaded.py      the rows of a `datasets.Dataset` or `IterableDataset`
field_map.py   known names for those of the data
records.py     a row in any known shape to messages, or the reason why it is dropped
messages.py    one turn, as data sets write it
token_rows.py  a row that was tokenised before, and what is learnt of it
tokenising.py  messages to token ids
shuffle.py     rows scattered over parts on disk, each part then put in its order
work_files.py  what a conversion leaves in its work folder, read back
tally.py       what was kept, by source, and what was dropped, by reason
"""

from __future__ import annotations

# What other folders may import, by module; tests/test_architecture.py holds it.
EXPORTS = {
    "convert": ("convert",),
    "field_map": ("FieldMap", "parse_map"),
    "inputs": ("find_inputs",),
    "loaded": ("check_loaded", "check_tokenizer", "loaded_kind", "token_columns_of"),
    "messages": ("DropReason", "RecordDropped", "is_given"),
    "peeking": ("read_records", "token_columns_in"),
    "records": ("KNOWN_SHAPES", "check_map", "normalise"),
    "report": ("ConvertReport",),
    "token_rows": ("holds_tokens", "read_tokens"),
    "tokenising": (
        "find_tokenizer",
        "keep_tokenizer",
        "load_tokenizer",
        "row_columns",
        "take_tokens",
        "token_columns",
        "tokenise",
        "tokenizer_fingerprint",
    ),
}
