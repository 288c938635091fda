"""What of a record does not reach its text is named; what stands in it in another form is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcollate.text.chat.dropped import dropped_fields

FORMS: dict[str, Callable[[str], str]] = {
    "as it is": str, "trimmed": str.strip, "JSON": json.dumps, "trimmed JSON": lambda text: json.dumps(text.strip()),
    "JSON, not in ASCII": lambda text: json.dumps(text, ensure_ascii=False),
}  # fmt: skip
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
KEYS = st.sampled_from(["content", "value", "reasoning_content", "thinking", "notes"])
TURN = st.dictionaries(KEYS, TEXTS, max_size=3)
TOOLS = st.lists(st.dictionaries(st.sampled_from(["name", "description", "parameters"]), TEXTS), max_size=3)


def written(value: Any, form: Callable[[str], str]) -> str:
    """All texts in a value."""
    if isinstance(value, str):
        return form(value)
    return " | ".join(written(item, form) for item in (value.values() if isinstance(value, dict) else value))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@given(turns=st.lists(TURN, max_size=5), tools=TOOLS, system=TEXTS, is_json=st.booleans())
def test_what_is_written_in_any_form_is_not_dropped(
    form: Callable[[str], str], turns: list[dict[str, Any]], tools: list[Any], system: str, is_json: bool
) -> None:
    record = {"messages": [{"role": "user", **turn} for turn in turns], "tools": tools, "system": system, "n": 5}
    text = f"<user>{written(record['messages'], form)} {written(tools, form)}{form(system)}"
    if is_json:
        record["tools"] = json.dumps(tools, indent=2)
    assert dropped_fields(record, text) == []


@given(
    turns=st.lists(st.dictionaries(KEYS, TEXTS, min_size=1), min_size=1, max_size=6), data=st.data(), deep=st.booleans()
)
def test_what_is_left_out_is_named(turns: list[dict[str, Any]], data: st.DataObject, deep: bool) -> None:
    text = written(turns, str)
    turn = data.draw(st.sampled_from(turns))
    key = data.draw(st.sampled_from(sorted(turn)))
    turn[key] = [{"type": "text", "text": "a  lost text \0"}] if deep else "a  lost text \0"
    made = [{"role": "user", **turn} for turn in turns]
    assert dropped_fields({"messages": made}, text) == [f"messages[].{key}"]
    assert dropped_fields({"a b": turn[key]}, text) == ["a b"]
    assert dropped_fields({"history": [["x", turn[key]]], "messages": made}, "x") == ["history", f"messages[].{key}"][
        :1
    ] + dropped_fields({"messages": made}, "x")


@pytest.mark.parametrize(
    ("record", "names"),
    [
        ({"system": "X"}, ["system"]),
        ({"id": "X-17", "source": "X", "n": 5, "ok": True, "score": 0.5, "none": None, "empty": "", "a": " \n"}, []),
        ({"note": "two words", "url": "https://x", "title": "説明", "date": "2026-01-31"}, ["note", "title"]),
        ({"images": ["x.png"], "image": {"bytes": b"x", "path": None}, "raw": b"x y"}, ["images", "image"]),
        ({"tools": [{"type": "function", "id": "i"}]}, []),
        ({"tools": '[{"name": "f"}]', "functions": "{"}, ["tools", "functions"]),
        ({"messages": [{"role": "assistant", "content": "said", "tool_call_id": "a b", "name": "bob"}]}, []),
        ({"messages": [{"from": "human", "value": "said", "tool_calls": [{"id": "1", "function": {"name": "f"}}]}]},
         ["messages[].tool_calls"]),
        ({"a": [{"role": "user", "content": "X"}, 5, "X", {"role": "user", "content": "X"}]}, ["a[].content"]),
        ({"meta": {"a": 1, "b": ["one", {"c": "two words"}]}}, ["meta"]),
        ([1], []),
    ],
)  # fmt: skip
def test_what_carries_text(record: Any, names: list[str]) -> None:
    assert dropped_fields(record, "said") == names


@pytest.mark.parametrize(
    ("said", "missing"),
    [
        ("<think>why</think>so", " (thoughts)"),
        ("<think>\nwhy\n</think>\n\nso ", " (thoughts)"),
        ("why</think>so", " (thoughts)"),
        ("<think>why</think>no", ""),
        ("<think>so</think>\nso", None),
        ("<think></think>so", None),
    ],
)
def test_thoughts_are_told_apart(said: str, missing: str | None) -> None:
    found = dropped_fields({"messages": [{"role": "assistant", "content": said}]}, "<think>\n so </think>so")
    assert found == ([] if missing is None else ["messages[].content" + missing])


def test_a_value_of_any_depth_is_looked_through() -> None:
    deep: Any = "two words"
    for _ in range(100_000):
        deep = [deep]
    assert dropped_fields({"x": deep, "tools": "[" * 100_000}, "") == ["x", "tools"]
