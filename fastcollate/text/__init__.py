"""A record -> texts with spans -> token ids."""

from typing import TYPE_CHECKING

from fastcollate.lazy import face

if TYPE_CHECKING:
    from fastcollate.text.chat.rendered import Rendered
    from fastcollate.text.engines.backends import Texts, UnencodableError, starts_of
    from fastcollate.text.templates import BadRecordError, Template, choose_template, load_template
    from fastcollate.text.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "BadRecordError",
    "Rendered",
    "Template",
    "Texts",
    "Tokenizer",
    "UnencodableError",
    "choose_template",
    "load_template",
    "load_tokenizer",
    "starts_of",
]
_MODULE_OF = {
    **dict.fromkeys(("Texts", "UnencodableError", "starts_of"), "engines.backends"),
    "Rendered": "chat.rendered",
    **dict.fromkeys(("BadRecordError", "Template", "choose_template", "load_template"), "templates"),
    **dict.fromkeys(("Tokenizer", "load_tokenizer"), "tokenizer"),
}
__getattr__, __dir__ = face(__name__, _MODULE_OF)
