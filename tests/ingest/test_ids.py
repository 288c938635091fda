"""Records that hold ids become rows by the documented rule, whatever holds them: compared with plain Python."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcollate import TokenStore, prepare
from fastcollate.errors import InputError
from fastcollate.ingest.ids.columns import KNOWN, columns_of_ids
from fastcollate.ingest.ids.rows import rows_of_ids, with_end_appended
from fastcollate.sources.blocks import Block
from fastcollate.sources.records import Records, TableRecords, read_records
from tests.helpers import run_cli
from tests.integrations import chats

VOCAB = 50
Record = dict[str, Any]
Row = tuple[list[int], list[int], int]


def naive_rows(number: int, record: Record) -> list[Row]:
    """Ids, spans and number of each row that a good record gives, cell by cell."""
    ids = record["input_ids"]
    real = record.get("attention_mask", [1] * len(ids))
    begins = set()
    if "seq_lengths" in record:
        begins = {sum(record["seq_lengths"][:i]) for i in range(len(record["seq_lengths"]))}
    span_of = [i for i, count in enumerate(record.get("spans", [])) for _ in range(count)]
    rows: list[list[tuple[int, bool]]] = []
    for place, token in enumerate(ids):
        if not real[place]:
            continue
        trained = all(
            record[mask][place] for mask in ("completion_mask", "assistant_masks", "loss_mask") if mask in record
        )
        if "labels" in record:
            trained = trained and record["labels"][place] != -100
        if "spans" in record:
            trained = trained and span_of[place] % 2 == 1
        if not rows or place in begins or record.get("position_ids", [1] * len(ids))[place] == 0:
            rows.append([])
        rows[-1].append((token, bool(trained)))
    found = []
    for row in rows:
        spans = [0]
        for _, trained in row:
            if trained != (len(spans) % 2 == 0):
                spans.append(0)
            spans[-1] += 1
        found.append(([token for token, _ in row], spans, number))
    return found


def json_chunks(records: list[Any]) -> list[Records]:
    """The same records as lines of JSON and as an array."""
    data = {"lines": "\n".join(map(json.dumps, records)), "array": json.dumps(records)[1:-1]}
    return [
        chunk
        for kind, text in data.items()
        for chunk in read_records(Block(0, 0, "x", kind, 0, len(records), 1, 0, 0), text.encode())
    ]


def chunks_of(records: list[Record]) -> list[Records]:
    """The same records as JSON and as a table."""
    return [*json_chunks(records), TableRecords(pa.Table.from_pylist(records))]


def rows_in(chunk: Records, columns: dict[str, str]) -> tuple[list[Row], dict[int, str]]:
    rows, bad = rows_of_ids(chunk, columns, VOCAB)
    found = [
        (
            rows.ids[rows.offsets[i] : rows.offsets[i + 1]].tolist(),
            rows.spans[rows.span_offsets[i] : rows.span_offsets[i + 1]].tolist(),
            int(rows.source_row[i]),
        )
        for i in range(len(rows.source_row))
    ]
    assert (rows.ids.dtype, rows.offsets.dtype, rows.spans.dtype) == ("uint32", "int64", "uint32")
    assert (rows.span_offsets.dtype, rows.source_row.dtype) == ("int64", "uint64")
    return found, bad


@st.composite
def record_lists(draw: st.DrawFn) -> list[Record]:
    """Good records that hold the same columns."""
    keys = draw(st.sets(st.sampled_from([key for key in KNOWN if key != "input_ids"])))
    records: list[Record] = []
    for _ in range(draw(st.integers(1, 6))):
        size = draw(st.integers(1, 12))
        left, right = draw(st.integers(0, size - 1)), 0
        if "attention_mask" not in keys:
            left = 0
        else:
            right = draw(st.integers(0, size - 1 - left))
        inner = sorted(draw(st.sets(st.integers(left + 1, size - right), max_size=3)) - {size - right})
        bounds = [left, *inner, size - right]
        ids = draw(st.lists(st.integers(0, VOCAB - 1), min_size=size, max_size=size))
        bits = st.lists(st.integers(0, 1), min_size=size, max_size=size)
        record: Record = {"input_ids": ids, "text": "passed over"}
        for key in keys:
            if key in ("completion_mask", "assistant_masks", "loss_mask"):
                record[key] = draw(bits)
            elif key == "attention_mask":
                record[key] = [0] * left + [1] * (size - left - right) + [0] * right
            elif key == "labels":
                record[key] = [i if t else -100 for i, t in zip(ids, draw(bits), strict=True)]
            elif key == "spans":
                cuts = sorted(draw(st.lists(st.integers(0, size), max_size=4)))
                record[key] = [b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
            elif key == "seq_lengths":
                record[key] = [b - a for a, b in zip([0, *inner], [*inner, size], strict=True)]
            else:
                positions = [p for a, b in pairwise(bounds) for p in range(b - a)]
                record[key] = [7] * left + positions + [7] * right
        records.append(record)
    return records


@pytest.mark.slow
@given(record_lists())
@settings(max_examples=300, deadline=None)
def test_rows_are_those_of_the_rule(records: list[Record]) -> None:
    expected = [row for number, record in enumerate(records) for row in naive_rows(number, record)]
    columns = columns_of_ids(list(records[0]), {})
    for chunk in chunks_of(records):
        assert rows_in(chunk, columns) == (expected, {})


@pytest.mark.slow
@given(record_lists(), st.integers(0, 2))
@settings(max_examples=200, deadline=None)
def test_an_end_that_closes_a_row_gives_way_to_the_appended_one(records: list[Record], end: int) -> None:
    """Compared cell by cell: ids with their end behind them, and which of these are trained."""
    for record in records:
        record["input_ids"] = [token % 3 for token in record["input_ids"]]
        record.pop("labels", None)
    rows, bad = rows_of_ids(TableRecords(pa.Table.from_pylist(records)), columns_of_ids(list(records[0]), {}), VOCAB)
    made = with_end_appended(rows, end)
    assert not bad
    assert (made.ids.dtype, made.offsets.dtype, made.spans.dtype) == ("uint32", "int64", "uint32")
    expected = [row for number, record in enumerate(records) for row in naive_rows(number, record)]
    for number, (ids, spans, _) in enumerate(expected):
        trained = [i % 2 == 1 for i, count in enumerate(spans) for _ in range(count)]
        if ids[-1] != end:
            ids, trained = [*ids, end], [*trained, trained[-1]]
        own = made.ids[made.offsets[number] : made.offsets[number + 1]].tolist()
        counts = made.spans[made.span_offsets[number] : made.span_offsets[number + 1]].tolist()
        flags = [i % 2 == 1 for i, count in enumerate(counts) for _ in range(count)]
        assert [*own, end] == ids
        assert flags + [len(counts) % 2 == 0] * (len(ids) - len(flags)) == trained
        assert sum(counts) - len(own) == len(counts) % 2  # a last prompt covers the end too


GOOD: Record = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
BAD: list[tuple[Record, str]] = [
    ({"input_ids": [1, 2, 3], "labels": [-100, 2]}, "3 ids, but 2 values in 'labels'"),
    ({"input_ids": [], "labels": []}, "'input_ids' is empty"),
    ({"input_ids": [1, VOCAB], "labels": [1, VOCAB]}, "id 50 is beyond the tokenizer's 50: another one has made it"),
    ({"input_ids": [-1, 2], "labels": [-1, 2]}, "id -1 is beyond the tokenizer's 50: another one has made it"),
    ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "'labels' is 2 where the id is 1: shifted by one already?"),
    ({"input_ids": [1, 2, 3], "labels": [1, 0, 3]}, "'labels' is 0 where the id is 2: give each label"),
    ({"input_ids": [1, 2], "labels": None}, "no 'labels', which the first record has"),
    ({"input_ids": [1, 2]}, "no 'labels', which the first record has"),
    ({"input_ids": None, "labels": [1]}, "no 'input_ids', which the first record has"),
]  # fmt: skip
ODD: list[tuple[Any, str]] = [  # which a table's column of lists cannot hold
    ({"input_ids": [1, 2.0], "labels": [1, 2]}, "'input_ids' holds 2.0, and is no list of whole numbers"),
    ({"input_ids": [1, None], "labels": [1, 2]}, "'input_ids' holds None, and is no list of whole numbers"),
    ({"input_ids": [[1]], "labels": [1]}, "'input_ids' holds [1], and is no list of whole numbers"),
    ({"input_ids": "abc", "labels": [1]}, "'input_ids' holds 'abc', and is no list of whole numbers"),
    ({"input_ids": [1], "labels": 1}, "'labels' holds 1, and is no list of whole numbers"),
    ({"input_ids": [1 << 70], "labels": [1]}, f"'input_ids' holds {[1 << 70]}, and is no list of whole numbers"),
    ({**GOOD, "loss_mask": [1, 1, 0]}, "holds 'loss_mask', which the first record does not"),
    ([1, 2], "not an object that holds ids"),
]


@pytest.mark.parametrize(("record", "reason"), BAD + ODD)
def test_a_bad_record_says_why_and_spoils_no_other(record: Any, reason: str) -> None:
    records = [GOOD, record, {**GOOD, "labels": [1, 2, 3]}]
    for chunk in chunks_of(records) if (record, reason) in BAD else json_chunks(records):
        rows, bad = rows_in(chunk, columns_of_ids(list(GOOD), {}))
        assert rows == [([1, 2, 3], [1, 2], 0), ([1, 2, 3], [0, 3], 2)]
        assert list(bad) == [1]
        assert bad[1].startswith(reason)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"attention_mask": [1, 0, 1]}, "'attention_mask' leaves out ids between others"),
        ({"attention_mask": [0, 0, 0]}, "'attention_mask' leaves out every id"),
        ({"position_ids": [1, 2, 3]}, "'position_ids' come to 1 without counting up"),
        ({"position_ids": [0, 1, 3]}, "'position_ids' come to 3 without counting up"),
        ({"seq_lengths": [1, 1]}, "3 ids, but 2 are counted by 'seq_lengths'"),
        ({"spans": [1, 3]}, "3 ids, but 4 are counted by 'spans'"),
        ({"spans": [4, -1]}, "'spans' holds a number below 0"),
        ({"seq_lengths": [1, 2], "position_ids": [0, 1, 2]}, "'position_ids' come to 1 without counting up"),
    ],
)
def test_columns_that_contradict_the_ids_are_refused(more: Record, reason: str) -> None:
    record = {"input_ids": [1, 2, 3], **more}
    for chunk in chunks_of([record]):
        assert rows_in(chunk, columns_of_ids(list(record), {})) == ([], {0: reason})


def test_what_a_table_holds_under_a_null_is_of_no_account() -> None:
    lists = pa.array([[1, 2], None, [3], [4, None], [5]])
    table = pa.table(
        {"input_ids": lists, "loss_mask": pa.array([[True, False], [True], [False], [True, True], [True]])}
    )
    for chunk in (TableRecords(table), TableRecords(pa.concat_tables([table.slice(0, 2), table.slice(2)]))):
        rows, bad = rows_in(chunk, columns_of_ids(table.column_names, {}))
        assert rows == [([1, 2], [0, 1, 1], 0), ([3], [1], 2), ([5], [0, 1], 4)]
        assert sorted(bad) == [1, 3]


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint16(), pa.int32(), pa.uint64()])
@pytest.mark.parametrize("list_of", [pa.list_, pa.large_list, pa.list_view, lambda kind: pa.list_(kind, 3)])
def test_integers_and_lists_of_any_kind(kind: pa.DataType, list_of: Any) -> None:
    table = pa.table({"input_ids": pa.array([[1, 2, 3], [4, 5, 6]], list_of(kind))})
    assert rows_in(TableRecords(table), {"input_ids": "input_ids"}) == (
        [([1, 2, 3], [0, 3], 0), ([4, 5, 6], [0, 3], 1)],
        {},
    )


def test_columns_are_named_or_refused() -> None:
    assert columns_of_ids(["tokens", "labels", "text"], {"input_ids": "tokens"}) == {
        "input_ids": "tokens",
        "labels": "labels",
    }
    for names, fields, message in (
        (["ids"], {}, r"no column 'input_ids' \(columns here: 'ids'\); map it with --field input_ids=NAME"),
        (["input_ids"], {"labels": "y"}, r"no column 'y'.*--field labels=NAME"),
        (["input_ids"], {"ids": "y"}, r"field 'ids': records that hold ids have the fields input_ids, labels"),
        (["input_ids", "prompt_mask"], {}, "column 'prompt_mask' may say what is trained"),
        (["input_ids", "loss_weights"], {}, "column 'loss_weights' may say what is trained"),
    ):
        with pytest.raises(InputError, match=message):
            columns_of_ids(names, fields)


def test_a_store_of_ids_is_one_whatever_held_them(tmp_path: Path) -> None:
    records = [
        {"input_ids": [i % 90, *range(i % 7), 50256], "completion_mask": [0, *[1] * (i % 7), i % 2], "text": "x"}
        for i in range(3000)
    ]
    table = pa.Table.from_pylist(records)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=77)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    asked: Any = {"template": "tokenized", "tokenizer": "gpt2"}
    for number, source in enumerate((tmp_path / "a.parquet", tmp_path / "a.jsonl", table, iter(records))):
        assert prepare(source, tmp_path / f"{number}", workers=1 + number % 2, **asked).num_rows == 3000
        assert prepare(records if number == 3 else source, tmp_path / f"{number}", **asked).reused
    shards = {(tmp_path / f"{number}" / "shard-00000.arrow").read_bytes() for number in range(4)}
    assert len(shards) == 1
    store = TokenStore(tmp_path / "2")
    assert (store.end, store.vocab_size, store.manifest["template"]["name"]) == ("in_row", 50257, "tokenized")
    wanted = [row for number, record in enumerate(records) for row in naive_rows(number, record)]
    assert [(row.input_ids.tolist(), row.spans.tolist(), row.source_row) for row in store] == wanted


def test_ids_need_their_tokenizer_and_are_placed_by_line(tmp_path: Path) -> None:
    lines = [{"input_ids": [1, 2]}, {"input_ids": [1, 50257]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n\n" for record in lines))
    with pytest.raises(InputError, match=r"records that hold ids need the one that made them \(--tokenizer\)"):
        prepare(tmp_path / "a.jsonl", tmp_path / "s", template="tokenized")
    with pytest.raises(InputError, match=r"a.jsonl, line 3, record 1: id 50257 is beyond the tokenizer's 50,257"):
        prepare(tmp_path / "a.jsonl", tmp_path / "s", template="tokenized", tokenizer="gpt2")
    report = prepare(tmp_path / "a.jsonl", tmp_path / "s", template="tokenized", tokenizer="gpt2", on_error="skip")
    assert (report.num_rows, report.summary["num_skipped"]) == (1, 1)


def test_the_command_line_takes_files_of_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pa.table({"tokens": [[1, 2, 3], [4, 5]], "loss_mask": [[0, 1, 1], [1, 0]], "id": ["a", "b"]})
    pq.write_table(table, tmp_path / "a.parquet")
    asked = ("--template", "tokenized", "--tokenizer", "gpt2")
    assert run_cli(monkeypatch, "prepare", tmp_path / "a.parquet", tmp_path / "s", *asked) == 1
    assert "no column 'input_ids' (columns here: 'tokens', 'loss_mask', 'id')" in capsys.readouterr().err
    named = (*asked, "--field", "input_ids=tokens", "--json")
    assert run_cli(monkeypatch, "prepare", tmp_path / "a.parquet", tmp_path / "s", *named) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["num_rows"] == 2
    assert [row.spans.tolist() for row in TokenStore(tmp_path / "s")] == [[1, 2], [0, 1, 1]]


def test_auto_takes_ids_where_records_hold_them(tmp_path: Path) -> None:
    record = {"input_ids": [1, 2, 50256], "labels": [-100, 2, 50256], "messages": [{"role": "user", "content": "x"}]}
    report = prepare([record, record], tmp_path / "s", tokenizer="gpt2")
    assert report.template == "tokenized (records hold ids)"
    assert [row.input_ids.tolist() for row in TokenStore(tmp_path / "s")] == [[1, 2, 50256]] * 2
    with pytest.raises(InputError, match=r"records that hold ids need the one that made them"):
        prepare([record], tmp_path / "t")
    appended = prepare([record], tmp_path / "u", tokenizer="gpt2", end="append")
    assert appended.num_rows == 1
    store = TokenStore(tmp_path / "u")
    assert (store.end, store[0].input_ids.tolist(), store[0].spans.tolist()) == ("append", [1, 2], [1, 1])
    text = {"instruction": "a", "output": "b", "input_ids": [1]}
    named = prepare([text], tmp_path / "v", tokenizer="gpt2", fields={"instruction": "instruction"})
    assert named.template.startswith("alpaca")
    with pytest.raises(InputError, match="train_on='last': template 'tokenized' has no use for it"):
        prepare([record], tmp_path / "w", tokenizer="gpt2", train_on="last")


def test_chats_and_the_ids_that_transformers_makes_of_them_give_the_same_shard(tmp_path: Path) -> None:
    """From a file, records, a table, a frame, a data set and a stream of it; and from `apply_chat_template`'s ids."""
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    pytest.importorskip("transformers")
    tokenizer = chats.byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    records = [{"messages": chat} for chat in chats.make_chats(100)]
    made = [
        tokenizer.apply_chat_template(record["messages"], return_dict=True, return_assistant_tokens_mask=True)
        for record in records
    ]
    ids = [{name: row[name] for name in ("input_ids", "attention_mask", "assistant_masks")} for row in made]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    dataset = datasets.Dataset.from_list(records)
    given = [tmp_path / "a.jsonl", records, pa.Table.from_pylist(records), pandas.DataFrame(records), dataset]
    shards = set()
    for number, source in enumerate([*given, dataset.to_iterable_dataset(), datasets.Dataset.from_list(ids), ids]):
        prepare(source, tmp_path / f"{number}", tokenizer=str(tmp_path / "tokenizer"))
        shards.add((tmp_path / f"{number}" / "shard-00000.arrow").read_bytes())
    assert len(shards) == 1
    assert [row.input_ids.tolist() for row in TokenStore(tmp_path / "0")] == [row["input_ids"] for row in ids]
