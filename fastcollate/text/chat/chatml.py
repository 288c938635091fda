"""ChatML for tokenizers that have no chat template of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastcollate.text.chat.rendered import Rendered
from fastcollate.text.chat.turns import join_parts, question_of, read_chat
from fastcollate.text.record import BadRecordError, Parts, Template, kind_of


class Chat(Template):
    """ChatML over a chat of any of the common formats.

    Every assistant turn that is trained and its `<|im_end|>` are a response; headings, other roles and line breaks are
    prompt.
    """

    single_turn = False

    def __init__(self, fields: Mapping[str, str], train_on: str = "all") -> None:
        super().__init__(
            "chat", {"fields": dict(fields), "reader": 2, **({"train_on": train_on} if train_on != "all" else {})}
        )
        self._fields = fields
        self._train_on = train_on

    def question(self, text: str, more: str = "") -> Rendered:
        """A user's turn, and the heading of an answer."""
        turns = [*question_of(text, more), {"role": "assistant", "content": "-"}]
        return Rendered(self.parts({"messages": turns})[0], [], [])

    def parts(self, record: Any) -> Parts:
        """Prompt, response, prompt, ..."""
        chat = read_chat(record, self._fields)
        last = max((number for number, is_trained in enumerate(chat.trains) if is_trained), default=0)
        parts, prompt = [], ""
        for number, turn in enumerate(join_parts(chat.variables["messages"])):
            content, is_trained = turn.get("content"), chat.trains[number]
            if not isinstance(content, str):
                raise BadRecordError(f"turn {number + 1}: its content is {kind_of(content)}, not text")
            heading = f"<|im_start|>{turn['role']}\n"
            if number:
                heading = "\n" + heading
            if is_trained and (self._train_on == "all" or number == last):
                parts += [prompt + heading, content + "<|im_end|>"]
                prompt = ""
            else:
                prompt += heading + content + "<|im_end|>"
        return [*parts, prompt] if prompt else parts
