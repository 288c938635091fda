"""A record -> texts with spans -> token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastcollate.lazy import face

if TYPE_CHECKING:
    from fastcollate.text.backends import Texts as Texts
    from fastcollate.text.backends import UnencodableError as UnencodableError
    from fastcollate.text.templates import BadRecordError as BadRecordError
    from fastcollate.text.templates import Template as Template
    from fastcollate.text.templates import load_template as load_template
    from fastcollate.text.tokenizer import Tokenizer as Tokenizer
    from fastcollate.text.tokenizer import load_tokenizer as load_tokenizer

_MODULE_OF = {
    **dict.fromkeys(("Texts", "UnencodableError"), "backends"),
    **dict.fromkeys(("BadRecordError", "Template", "load_template"), "templates"),
    **dict.fromkeys(("Tokenizer", "load_tokenizer"), "tokenizer"),
}
__getattr__, __dir__ = face(__name__, _MODULE_OF)
