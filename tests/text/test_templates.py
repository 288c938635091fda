"""Templates: what a record gives, and what it is refused for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastcollate.text.templates import BadRecordError, Template, load_template


def jinja(tmp_path: Path, source: str, *, encoding: str = "utf-8") -> Template:
    pytest.importorskip("jinja2")
    path = tmp_path / "t.jinja"
    path.write_text(source, encoding=encoding)
    return load_template(str(path))


def test_a_byte_order_mark_begins_no_prompt(tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-8-sig"):
        assert jinja(tmp_path, "Q: {{ q }}", encoding=encoding).parts({"q": "x"}) == ["Q: x"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"the template prints null \(None\); give a default, such as \{\{ x or '' \}\}"),
        (["a"], r"the template prints a list \(\['a'\]\); print its parts, or \{\{ x \| tojson \}\}"),
        ({"a": 1}, r"the template prints an object .*; print its parts"),
        (True, r"the template prints true or false \(True\)"),
        (float("nan"), r"the template prints NaN or infinite \(nan\)"),
        (float("inf"), r"the template prints NaN or infinite \(inf\)"),
    ],
)
def test_what_python_would_write_is_refused(tmp_path: Path, value: Any, message: str) -> None:
    for source in ("{{ x }}", "{% for v in [x] %}{{ v }}{% endfor %}", "{% generation %}{{ x }}{% endgeneration %}"):
        with pytest.raises(BadRecordError, match=message):
            jinja(tmp_path, source).parts({"x": value})


def test_what_a_template_may_print(tmp_path: Path) -> None:
    source = "{{ a }} {{ b }} {{ c or '-' }} {{ d | tojson }} {% if e %}yes{% endif %} {{ d | join(',') }}"
    record = {"a": "x", "b": 5, "c": None, "d": [1, "y"], "e": True}
    assert jinja(tmp_path, source).parts(record) == ['x 5 - [1, "y"] yes 1,y']
    with pytest.raises(BadRecordError, match="the template fails: "):
        jinja(tmp_path, "{{ d | tojson }}").parts({"d": [float("nan")]})


@pytest.mark.parametrize(
    "source",
    [
        "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
        "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{% for x in record['deep'] recursive %}{{ loop(record['deep']) }}{% endfor %}",
    ],
)
def test_endless_recursion_is_a_bad_record(tmp_path: Path, source: str) -> None:
    with pytest.raises(BadRecordError, match="the template fails: it calls itself without end"):
        jinja(tmp_path, source).parts({"deep": [1]})


@pytest.mark.parametrize(
    "record",
    [
        {"messages": None, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        {"messages": [{"role": None, "from": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        {
            "messages": [
                {"role": "user", "content": None, "value": "Hi"},
                {"from": "gpt", "content": "Ho", "value": None},
            ]
        },
    ],
)
def test_a_null_hides_no_other_name_of_a_chat(record: dict[str, Any]) -> None:
    parts = load_template("chat").parts(record)
    assert parts == ["<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Ho<|im_end|>"]


@pytest.mark.parametrize("role", ["Assistant", "chat", "assistant ", "ai"])
def test_a_role_that_is_not_known_is_a_bad_record(role: str) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": role, "content": "Ho"}]
    with pytest.raises(BadRecordError, match=f"turn 2: the role '{role}' is not known; use one of system, "):
        load_template("chat").parts({"messages": turns})
