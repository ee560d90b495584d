"""Files of rows as people have them, and configurations of any content: read rightly, or refused with what to do."""

from __future__ import annotations

import codecs
import gzip
import json

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from c2c.config import ConfigError
from c2c.data.files import read_rows
from c2c.errors import C2CError
from c2c.evaluation.config import EvalConfig, load_eval_config
from c2c.training import TrainConfig, load_config

ROWS = [{"context": "Gebäude, 1924.", "question": q, "answer": "1924"} for q in ("When?", "Which year?")]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
ASKED = [{"question": row["question"], "answer": "1924"} for row in ROWS]
SQUAD = {"version": "1.1", "data": [{"title": "House", "paragraphs": [{"context": ROWS[0]["context"], "qas": ASKED}]}]}


@pytest.mark.parametrize(
    "content",
    [
        LINES.encode(),
        codecs.BOM_UTF8 + LINES.encode(),
        LINES.replace("\n", "\r\n").encode(),
        ("\n" + LINES.replace("\n", "\n\n")).encode(),
        gzip.compress(LINES.encode()),
        json.dumps(ROWS).encode(),
        json.dumps(ROWS, indent=2).encode(),
        json.dumps({"data": ROWS}).encode(),
        json.dumps(SQUAD).encode(),
        json.dumps(SQUAD, indent=1).encode(),
    ],
    ids=["lines", "bom", "crlf", "gaps", "gzip", "list", "indented list", "data", "squad", "indented squad"],
)
def test_the_same_rows_are_read_from_every_layout(tmp_path, content):
    (tmp_path / "rows.jsonl").write_bytes(content)
    found = [row for _, row in read_rows(tmp_path / "rows.jsonl")]
    assert [{key: row[key] for key in ROWS[0]} for row in found] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1\x15\x04", "Parquet.*read_parquet"),
        ("a.xlsx", b"PK\x03\x04", "spreadsheet"),
        ("a.csv", b"question,answer\n", "table.*read_csv"),
        ("a.jsonl", LINES.encode("utf-16"), "UTF-16.*iconv"),
        ("a.jsonl", LINES.encode("utf-16-le"), "UTF-16.*iconv"),
        ("a.jsonl", LINES.encode("latin-1"), "no text in UTF-8.*iconv"),
        ("a.jsonl", gzip.compress(LINES.encode() * 50)[:-20], "damaged gzip"),
        ("a.jsonl", b'{"question": "\\ud800"}\n', "surrogate"),
        ("a.jsonl", b"[" * 100_000, "not JSON"),
        ("a.jsonl", b"[1, 2]\n", "item 1.*expected an object"),
        ("a.jsonl", b'{"data": [{"paragraphs": [{"qas": [{}]}]}]}', "paragraphs"),
    ],
)
def test_files_of_other_formats_are_refused_with_what_to_do(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}.*{message}"):
        list(read_rows(tmp_path / name))


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["cpu", "\0", "1,2"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


def configurations(kind, required):
    names = st.sampled_from([*kind.__dataclass_fields__, "unknown"])
    return st.builds(lambda base, more: base | more, st.just(required), st.dictionaries(names, values, max_size=3))


SOURCE = [{"path": "x.jsonl"}]
TRAIN = {"receiver": "a", "sharer": "b", "output_dir": "c", "train": SOURCE, "dev": SOURCE}


@pytest.mark.fuzz
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(configurations(TrainConfig, TRAIN), configurations(EvalConfig, {"data": SOURCE, "output_dir": "c"}))
def test_any_configuration_is_taken_or_refused_by_name(tmp_path, train, evaluate):
    """No other error, and what is taken has the types that the class says."""
    for load, data in ((load_config, train), (load_eval_config, evaluate)):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
        try:
            made = load(tmp_path / "config.yaml")
        except C2CError:
            continue
        assert isinstance(made, TrainConfig | EvalConfig)
