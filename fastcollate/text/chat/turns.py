"""A record of any of the common formats -> a chat as `transformers` takes it, and which of its turns are trained."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fastcollate.errors import shown
from fastcollate.text.record import BadRecordError, kind_of, refuse_labels, role_of

_TURNS = ("messages", "conversations", "conversation")
_SYSTEM = ("system", "system_prompt")
_INSTRUCTIONS, _INPUTS, _OUTPUTS = ("instruction", "question", "query"), ("input",), ("output", "answer", "response")
_CALLS = ("function_call", "tool_call")  # roles of ShareGPT's relatives, whose text is the call
_TRAIN_KEYS = ("train", "training", "train_on_turn")
_SPECIAL_KEYS = {"from", "value", "weight", "train_detail", *_TRAIN_KEYS}
_OURS = {"messages", "tools", "documents", "add_generation_prompt", "chat_template"}


class Chat(NamedTuple):
    """A chat.

    Attributes:
        variables: what a template sees: `messages`, and perhaps `tools`, `documents` and further arguments.
        trains: of each turn, whether what it says is trained.
        read: the fields of the record that it was made of.
    """

    variables: dict[str, Any]
    trains: list[bool]
    read: frozenset[str]


def question_of(text: str, more: str = "") -> list[dict[str, Any]]:
    """The turn of a user who asks, and perhaps gives an input."""
    return [{"role": "user", "content": f"{text}\n\n{more}" if more else text}]


def read_chat(record: Any, fields: Mapping[str, str]) -> Chat:
    """The chat of a record: `messages`, `conversations`, `prompt` and `completion`, or an instruction and its answer.

    Raises:
        BadRecordError: it is none, or says something that a chat template cannot be told.
    """
    if not isinstance(record, dict):
        raise BadRecordError(f"not an object but {kind_of(record)}")
    refuse_labels(record, fields)
    name = fields.get("messages") or next((name for name in _TURNS if record.get(name) is not None), None)
    if name is not None:
        turns, trains, read = *_turns(record.get(name), name), [name]
    elif record.get("prompt") is not None and record.get("completion") is not None:
        turns, trains, read = *_prompt_and_completion(record["prompt"], record["completion"]), ["prompt", "completion"]
    else:
        turns, trains, read = _instruction(record)
    if not turns:
        raise BadRecordError("no text: there are no turns")
    system = next((name for name in (fields.get("system"), *_SYSTEM) if name and record.get(name)), None)
    if system is not None and turns[0].get("role") != "system":
        if not isinstance(record[system], str):
            raise BadRecordError(f"field {system!r} is {kind_of(record[system])}, not text")
        turns, trains = [{"role": "system", "content": record[system]}, *turns], [False, *trains]
        read.append(system)
    variables: dict[str, Any] = {"messages": turns, "tools": None, "documents": None}
    for field, load in (("tools", _tools), ("documents", _documents), ("chat_template_kwargs", _arguments)):
        place = fields.get(field, field)
        if record.get(place) is not None:
            loaded = load(record[place])
            if field == "tools" and loaded and name and name.startswith("conversation"):  # bare there, unlike elsewhere
                loaded = [t if "function" in t else {"type": "function", "function": t} for t in loaded]
            variables |= loaded if field == "chat_template_kwargs" else {field: loaded}
            read.append(place)
    return Chat(variables, trains, frozenset(read))


def _turns(turns: Any, name: str) -> tuple[list[dict[str, Any]], list[bool]]:
    if not isinstance(turns, list):
        raise BadRecordError(f"{name} is {kind_of(turns)}, not a list of turns")
    found, trains = [], []
    for number, turn in enumerate(turns, 1):
        if type(turn) is not dict:
            raise BadRecordError(f"turn {number} is {kind_of(turn)}, not an object")
        if not _SPECIAL_KEYS.isdisjoint(turn):
            turn, is_trained = _without_special_keys(turn, number)
        else:
            turn = {key: value for key, value in turn.items() if value is not None}
            is_trained = True
        given = turn.get("role")
        role = given if given == "user" or given == "assistant" else _role(turn, number)
        if role != given:
            turn["role"] = role
        if role == "assistant":
            reasoning = turn.get("reasoning_content", turn.get("thinking", turn.get("reasoning")))
            if reasoning is not None:  # as transformers: under the name that templates read
                turn = {"thinking": reasoning, **turn, "reasoning_content": reasoning}
        if type(turn.get("content")) is not str:
            _check_content(turn, number)
        found.append(turn)
        trains.append(is_trained and role == "assistant")
    return found, trains


def _role(turn: dict[str, Any], number: int) -> str:
    role = turn.get("role")
    if not isinstance(role, str) or not role:
        raise BadRecordError(f"turn {number} has no role")
    if role in _CALLS:
        turn["tool_calls"] = _calls(turn.pop("content", None), number)
        return "assistant"
    return role_of(role, number)


def _without_special_keys(turn: Mapping[str, Any], number: int) -> tuple[dict[str, Any], bool]:
    """A turn without the names of ShareGPT and without what says whether it is trained, and that."""
    found = {key: value for key, value in turn.items() if value is not None and key not in _SPECIAL_KEYS}
    for name, other in (("role", "from"), ("content", "value")):
        if turn.get(name) is None and turn.get(other) is not None:
            found[name] = turn[other]
    if turn.get("train_detail") is not None:
        raise BadRecordError(f"turn {number}: train_detail names single characters; mask whole turns by train: false")
    weight, flags = turn.get("weight"), [turn[key] for key in _TRAIN_KEYS if turn.get(key) is not None]
    if weight is not None and (type(weight) not in (int, float) or weight not in (0, 1)):
        raise BadRecordError(f"turn {number}: its weight is {shown(weight)}; a turn is trained (1) or not (0)")
    if not all(isinstance(flag, bool) for flag in flags):
        raise BadRecordError(f"turn {number}: {' or '.join(_TRAIN_KEYS)} is neither true nor false")
    is_answer = found.get("role") in _CALLS or role_of(found.get("role"), number) == "assistant"
    if any(flags) and not is_answer:
        raise BadRecordError(f"turn {number}: train is true, but only what the assistant says is trained")
    return found, weight != 0 and all(flags)


def _calls(content: Any, number: int) -> list[dict[str, Any]]:
    """The calls that a turn of the role `function_call` holds as JSON."""
    try:
        calls = json.loads(content)
        calls = calls if isinstance(calls, list) else [calls]
        return [{"type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}} for c in calls]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise BadRecordError(
            f'turn {number}: a function_call is JSON such as {{"name": ..., "arguments": {{...}}}}, not '
            f"{shown(content)} ({type(error).__name__})"
        ) from error


def _check_content(turn: Mapping[str, Any], number: int) -> None:
    """Refuse a content that no template can write as text."""
    content = turn.get("content")
    if content is None:
        if turn["role"] != "assistant" or not (turn.get("tool_calls") or turn.get("reasoning_content")):
            raise BadRecordError(f"turn {number} has no content")
    elif isinstance(content, list) and turn["role"] != "tool":
        for part in content:
            held = {key for key, value in part.items() if value is not None} if isinstance(part, dict) else set()
            if "type" not in held or not (held == {"type", "text"} or part["type"] == "text"):
                kind = shown(part.get("type")) if isinstance(part, dict) else kind_of(part)
                raise BadRecordError(f"turn {number}: a part of its content is {kind}, not text; only text is trained")
            if not isinstance(part.get("text"), str):
                raise BadRecordError(f"turn {number}: a part of its content holds no text under 'text'")
    elif turn["role"] not in ("tool", "function", "ipython"):  # whose results may be any JSON
        raise BadRecordError(f"turn {number}: its content is {kind_of(content)}, not text")


def _prompt_and_completion(prompt: Any, completion: Any) -> tuple[list[dict[str, Any]], list[bool]]:
    """Both as turns, of which those of the completion are trained."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return _pair(prompt, completion)
    before, _ = _turns(prompt, "prompt")
    after, trains = _turns(completion, "completion")
    return before + after, [False] * len(before) + trains


def _pair(prompt: str, answer: str) -> tuple[list[dict[str, Any]], list[bool]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], [False, True]


def _instruction(record: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[bool], list[str]]:
    """Instruction, input and output, after the `history` that came before them, as turns."""
    names = [
        next((name for name in names if record.get(name) is not None), None)
        for names in (_INSTRUCTIONS, _INPUTS, _OUTPUTS)
    ]
    texts = [record[name] if name else "" for name in names]
    if names[0] is None or names[2] is None or not all(isinstance(text, str) for text in texts):
        have = ", ".join(map(repr, list(record)[:8])) or "none"
        raise BadRecordError(f"no turns (fields here: {have}); map them with --field messages=NAME")
    turns: list[dict[str, Any]] = []
    trains: list[bool] = []
    read = [name for name in names if name]
    for pair in record.get("history") or ():
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRecordError("history is not a list of pairs of texts")
        turns, trains = turns + _pair(*pair)[0], [*trains, False, True]
        read.append("history")
    last, is_trained = _pair("\n".join(text for text in texts[:2] if text), texts[2])
    return turns + last, trains + is_trained, read


def _tools(tools: Any) -> Any:
    """Tools as a list, which may stand as JSON text."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) or None if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise BadRecordError(f"tools is text, but not JSON ({error})") from error
    if tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return tools
    raise BadRecordError(f"tools is {kind_of(tools)}, not a list of objects")


def _documents(documents: Any) -> Any:
    if isinstance(documents, list) and all(isinstance(document, dict) for document in documents):
        return documents
    raise BadRecordError(f"documents is {kind_of(documents)}, not a list of objects")


def _arguments(arguments: Any) -> dict[str, Any]:
    if isinstance(arguments, dict) and _OURS.isdisjoint(arguments):
        return {name: value for name, value in arguments.items() if value is not None}
    raise BadRecordError(f"chat_template_kwargs is {kind_of(arguments)}, not an object of arguments")


def join_parts(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns with contents of several texts as one, for a template that knows no parts.

    Raises:
        BadRecordError: a part is of another type, which only a template can tell from text.
    """
    for number, part in other_parts(turns):
        raise BadRecordError(
            f"turn {number}: a part of its content is {part['type']!r}, and this template knows no parts"
        )
    return [
        {**turn, "content": "".join(part["text"] for part in turn["content"])}
        if isinstance(turn.get("content"), list)
        else turn
        for turn in turns
    ]


def other_parts(turns: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The parts of contents whose text is of another type, such as `python`, with the numbers of their turns."""
    for number, turn in enumerate(turns, 1):
        content = turn.get("content")
        if isinstance(content, list) and turn["role"] != "tool":
            yield from ((number, part) for part in content if part["type"] != "text")
