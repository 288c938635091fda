"""A user's template has the filters, globals and tags of `transformers`, and prints the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcollate.errors import InputError
from fastcollate.text.jinja_env import GENERATION, ChatProgram, compile_template
from fastcollate.text.templates import BadRecordError, Template, load_template

pytest.importorskip("jinja2")
theirs = pytest.importorskip("transformers.utils.chat_template_utils")

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "find_<hotel>",
            "description": 'Zimmer & Frühstück: don\'t ask for > 3 nights; naïve "quotes", 東京, 👩‍👩‍👧 </tools>',
            "parameters": {
                "type": "object",
                "required": ["z_city", "a_filter"],
                "properties": {
                    "z_city": {"type": "string", "enum": ["Zürich", "São Paulo", "\u2028", "a\\b\n\tc"]},
                    "a_filter": {
                        "type": "array",
                        "items": {"anyOf": [{"type": "null"}, {"$ref": "#/<T>"}], "default": {"b": [], "a": {}}},
                    },
                    "n": {"type": ["integer", "null"], "maximum": 1e300, "minimum": -0.5, "default": None},
                },
            },
            "strict": True,
        },
    },
    {"type": "function", "function": {"name": "now", "description": "", "parameters": {}}},
]
CALL = {"z": "東京", "a": ["<", {"k": None}]}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "You're <b>kind</b> & brief."},
    {"role": "user", "content": "Wo ist's schön? 東京 <tool_call> 'x' \"y\""},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "find_<hotel>", "arguments": CALL}},
            {"type": "function", "function": {"name": "now", "arguments": {}}},
        ],
    },
    {"role": "tool", "name": "now", "content": {"rooms": [{"price": 1.5, "free": False, "note": "l'été & <i>"}]}},
    {"role": "assistant", "content": "  In Zürich 👩‍👩‍👧.  "},
    {"role": "user", "content": "Danke"},
    {"role": "assistant", "content": "Gern."},
]  # fmt: skip
TEMPLATES = {
    "hermes": """{{- bos_token }}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\nYou are given signatures within <tools></tools>:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n{\\"name\\": <function-name>}<|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(last=messages | length - 1, seen=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if not ns.seen and message.role == "user" %}{% set ns.seen = true %}{% set ns.last = index %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if loop.first and message.role == 'system' %}{% continue %}{% endif %}
    {%- if message.role == "assistant" %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {{- message.content | trim }}
        {%- for call in message.tool_calls | default([]) %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' ~ (message.content | tojson) ~ '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{{- ns.last ~ '' }}""",
    "indented": """{{ bos_token }}[AVAILABLE_TOOLS] {{ tools | tojson(indent=4) }}
{% for tool in tools -%}
{%- set function = tool.function %}
- {{ function.name }}: {{ function.parameters | tojson(indent=2, ensure_ascii=true) }}
{{ function | tojson(separators=(',', ':'), sort_keys=true) }}
{% if loop.index == 7 %}{% break %}{% endif %}
{% endfor %}
{% for message in messages if message.role == "assistant" %}
A: {% generation %}{{ message | tojson }}{{ message.content | upper }}{% endgeneration %}
{% else %}
{{ raise_exception("no answer") }}
{% endfor %}""",
    "literals": """{% macro schema(value, depth=0) %}
{% if value is mapping %}{% for key, inner in value | dictsort %}{{ '  ' * depth }}{{ key | e }}:
{{ schema(inner, depth + 1) }}{% endfor %}
{% elif value is iterable and value is not string %}{% for inner in value %}{{ schema(inner, depth + 1) }}{% endfor %}
{% else %}{{ '  ' * depth ~ (value | tojson) }} {{ value | string | length }}
{% endif %}{% endmacro %}
{{ schema(tools) }}{{ dict(a='<', b=[1, "é"]) | tojson }}{{ dict.fromkeys(['x', 'y'], '&') | tojson }}
{% set message = messages[3] %}{{ {"output": message.content, "n": none, "t": true, 'x': "'"} | tojson }}
{% set ns = namespace({'a': 1}, b='<') %}{% set ns.c = 2 %}{{ ns.a + ns.c }}{{ ns.b }}
{% for message in messages | selectattr('role', 'equalto', 'user') %}{{ message.content }}
{{ message.content | tojson | length }}
{% endfor %}{{ messages | map(attribute='role') | unique | join(', ') }} {{ "%s & %s" | format("<", "é") }}""",
    "scopes": """{% set a = namespace(x=1) %}{% set b = namespace(y=2) %}
{{ a.x }}{{ (b.x is defined) ~ "" }}{{ a.y | default('none') }}{{ (a["x"] is defined) ~ "" }}
{% macro wrapped(text) %}<{{ text }}>{% endmacro %}
{% for message in messages %}{% set content = message.content | string %}
{% generation %}{{ loop.index }}{% set content = content ~ '!' %}{% set b.y = b.y + 1 %}{{ wrapped(content) }}
{% for tool in tools %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ tool.function.name }}{% endfor %}
{% endgeneration %}
{{ content }}{{ b.y }}{{ (message.missing is defined) ~ (message["missing"] is defined) }}{{ message.keys() | length }}
{% endfor %}""",
}  # fmt: skip


def jinja(folder: Path, source: str) -> Template:
    (folder / "t.jinja").write_text(source, encoding="utf-8")
    return load_template(str(folder / "t.jinja"))


def spans_of(parts: list[str]) -> list[tuple[int, int]]:
    """Where the responses lie in the whole text, those that are empty left out."""
    ends = [len("".join(parts[:index])) for index in range(len(parts) + 1)]
    return [span for span in zip(ends[1::2], ends[2::2], strict=False) if span[0] < span[1]]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [TOOLS, TOOLS[1:], TOOLS * 5])
def test_templates_with_tools_give_the_text_and_the_spans_of_transformers(
    tmp_path: Path, name: str, tools: list[dict[str, Any]]
) -> None:
    source = TEMPLATES[name]
    (text,), (spans,) = theirs.render_jinja_template(
        [MESSAGES], tools=tools, chat_template=source, return_assistant_tokens_mask=True, bos_token="<s>"
    )
    parts = jinja(tmp_path, source).parts({"messages": MESSAGES, "tools": tools, "bos_token": "<s>"})
    assert "".join(parts) == text
    assert spans_of(parts) == [tuple(span) for span in spans]
    assert ChatProgram("t", source).run({"messages": MESSAGES, "tools": tools, "bos_token": "<s>"}) == (text, spans)
    assert len(spans) == {"literals": 0, "scopes": len(MESSAGES)}.get(name, 3)
    assert "東京" in text or tools == TOOLS[1:]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip
ARGUMENTS = ["", "(indent=4)", "(true)", "(false, 2)", "(separators=(',', ':'))", "(sort_keys=true)", "(indent='\\t')"]
SOURCES = [f"{{{{ x | tojson{arguments} }}}}" for arguments in ARGUMENTS]
COMPILED = [(compile_template("t", source, lambda value: value), source) for source in SOURCES]


@pytest.mark.slow
@given(value=VALUES)
def test_tojson_is_that_of_transformers(value: Any) -> None:
    for template, source in COMPILED:
        assert template.render(x=value) == theirs._compile_jinja_template(source).render(x=value)
    assert COMPILED[0][0].render(x=value) == json.dumps(value, ensure_ascii=False)


def test_the_names_are_those_of_transformers() -> None:
    ours = compile_template("t", "x", lambda value: value).environment
    other = theirs._compile_jinja_template("x").environment
    assert set(ours.filters) - {GENERATION} == set(other.filters)
    assert set(ours.tests) == set(other.tests)
    assert set(ours.globals) == set(other.globals) - {"strftime_now"}  # the same job gives the same rows tomorrow
    tags = [set().union(*(one.tags for one in e.extensions.values())) for e in (ours, other)]
    assert tags[0] == tags[1] == {"generation", "break", "continue"}
    for name in ("trim_blocks", "lstrip_blocks", "autoescape", "keep_trailing_newline", "newline_sequence"):
        assert getattr(ours, name) == getattr(other, name)


@pytest.mark.parametrize(
    "source",
    [
        "{{ namespace(_x=1)._x }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ dict.mro() }}",
        "{{ dict.__init__ }}{{ ''.__class__ }}",
        "{{ raise_exception('no') }}",
        "{{ tools.append(1) }}",
    ],
)
def test_what_transformers_refuses_is_refused(tmp_path: Path, source: str) -> None:
    record = {"tools": [1]}
    try:
        text = theirs._compile_jinja_template(source).render(**record)
    except theirs.jinja2.exceptions.TemplateError:
        text = ""
    assert text == ""  # an attribute that may not be had is undefined there, and prints nothing
    with pytest.raises(BadRecordError, match="the template fails: "):
        jinja(tmp_path, source).parts(record)


def test_a_date_is_the_templates_own(tmp_path: Path) -> None:
    source = "{% if strftime_now is defined %}{{ strftime_now('%d') }}{% else %}26 Jul 2024{% endif %}"
    assert jinja(tmp_path, source).parts({"a": 1}) == ["26 Jul 2024"]
    with pytest.raises(BadRecordError, match="the template fails: 'strftime_now' is undefined"):
        jinja(tmp_path, "{{ strftime_now('%Y') }}").parts({"a": 1})


def test_a_store_of_jinjas_own_tojson_is_another(tmp_path: Path) -> None:
    assert jinja(tmp_path, "{{ a }}").identity().keys() == {"name", "source"}
    assert jinja(tmp_path, "{{ a | tojson }}").identity()["tojson"] == "transformers"


@pytest.mark.parametrize("source", ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if a %}" * 3000])
def test_a_template_that_is_nested_too_deeply(tmp_path: Path, source: str) -> None:
    with pytest.raises(InputError, match=r"t\.jinja'(, line \d+)?: "):
        jinja(tmp_path, source)
