"""A `tokenizer.json`: tokenizers defines the ids; gigatoken gives the same ones sooner where it takes the file."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from fastcollate.errors import InputError, import_extra
from fastcollate.text.added import AddedTokens
from fastcollate.text.engines.agreement import HARD_TEXTS, AgreeingBackend
from fastcollate.text.engines.backends import RaggedIds, Texts, TokenizersBackend
from fastcollate.text.engines.gigatoken import GigatokenBackend
from fastcollate.text.saved import Saved, SavedToken

_SOON = 1 << 20  # bytes of text that tokenizers has encoded sooner than gigatoken is loaded


class TokenizerJson:
    """What encodes by a `tokenizer.json`.

    Attributes:
        loaded: the tokenizer of the package tokenizers, with the tokens that the configuration adds.
        fingerprint: SHA-256 over the file, and over the added tokens where the configuration adds some to it.
        added: its added tokens.
        plain: what takes no text for an added token.
        full: what takes each for one: for texts that a template wrote.
        pieces: as `plain`, for the pieces of such a text between its added tokens; only where it `has_pieces`.
        normalizes: whether it changes texts before it parts them.
        scheme: whose texts part at the same places; see `boundaries`.
        unknown: the id of what is not in the vocabulary, or -1.
    """

    def __init__(self, saved: Saved, path: Path, backend: str) -> None:
        self._tokenizers = import_extra("tokenizers", "hf")
        content = msgspec.json.encode(saved.parts).decode()
        self.loaded = self._load(content, path)
        self.loaded.no_truncation()
        self.loaded.no_padding()
        num_new = self._add(saved.named)
        if num_new:
            content = self.loaded.to_str()
        parts = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
        tokens = msgspec.json.decode(parts.get("added_tokens") or b"[]", type=list[SavedToken])
        self.added = AddedTokens(tokens)
        self.fingerprint = hashlib.sha256(saved.files["tokenizer.json"]).hexdigest()
        if num_new:  # then the file is not all that decides the ids
            self.fingerprint = hashlib.sha256(self.fingerprint.encode() + msgspec.json.encode(tokens)).hexdigest()
        others = self.added.without_control(self.loaded.get_vocab_size(with_added_tokens=False))
        plain, pieces = self._plain(others), self._plain(others)
        pieces.post_processor = self.loaded.post_processor
        self.pieces = TokenizersBackend(pieces)
        takes = backend != "tokenizers" and _gigatoken_takes(parts, self.added)
        self.normalizes = bool(_steps(parts.get("normalizer")))
        model = msgspec.json.decode(parts["model"], type=_Model)
        self.scheme = _scheme(_steps(parts.get("pre_tokenizer"))) if takes else "unknown"
        self.unknown = self.added.control.get(model.unk_token or "", -1)
        self.has_pieces = _has_pieces(parts, self.added)

        def backend_of(text: str, exact: TokenizersBackend) -> WarmingBackend:
            def make() -> AgreeingBackend:
                return AgreeingBackend(
                    GigatokenBackend.of_json(text), exact, self.fingerprint, normalizes=self.normalizes
                )

            return WarmingBackend(exact, make if takes else None, [*self.added.control])

        without = msgspec.json.encode({**parts, "added_tokens": msgspec.Raw(msgspec.json.encode(others))}).decode()
        self.plain = backend_of(without, TokenizersBackend(plain))
        self.full = backend_of(content, TokenizersBackend(self.loaded))

    def _load(self, content: str, path: Path) -> Any:
        try:
            return self._tokenizers.Tokenizer.from_str(content)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the package raises bare Exception for a malformed file, and may panic
            raise InputError(f"tokenizer {str(path)!r}: not a tokenizer.json ({error})") from error

    def _add(self, tokens: Sequence[SavedToken]) -> int:
        """Add those that the file does not have, as transformers does; how many these are."""
        have = {token.content for token in self.loaded.get_added_tokens_decoder().values()}
        new = {token.content: token for token in tokens if token.content not in have}
        return int(self.loaded.add_tokens([self._token(token) for token in new.values()]))

    def _token(self, token: SavedToken) -> Any:
        flags = {name: value for name, value in msgspec.structs.asdict(token).items() if name not in ("content", "id")}
        return self._tokenizers.AddedToken(token.content, **flags)

    def _plain(self, others: Sequence[SavedToken]) -> Any:
        """The same tokenizer, in memory too, with other added tokens."""
        plain = self._tokenizers.Tokenizer(self.loaded.model)
        plain.normalizer, plain.pre_tokenizer = self.loaded.normalizer, self.loaded.pre_tokenizer
        plain.add_tokens([self._token(token) for token in others])
        assert all(plain.token_to_id(token.content) == token.id for token in others)
        return plain


# Llama 3's and Qwen's; they differ in which characters make a word, and how many digits a number.
_LIKE_CL100K = {
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?{word}+|{number}"
    rf"| ?[^\s\p{{L}}{mark}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for word, mark in ((r"\p{L}", ""), (r"[\p{L}\p{M}]", r"\p{M}"))
    for number in (r"\p{N}", r"\p{N}{1,3}")
}


class _Model(msgspec.Struct):
    """The part of a model that decides whether gigatoken takes it; the values are those that it does."""

    type: str = "BPE"
    dropout: float | None = None
    unk_token: str | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    byte_fallback: bool = False
    ignore_merges: bool = False


def _gigatoken_takes(parts: Mapping[str, msgspec.Raw], added: AddedTokens) -> bool:
    """Whether the file is of the kind on which the two are known to agree; of others gigatoken passes over parts."""
    if importlib.util.find_spec("gigatoken") is None:
        return False
    model = msgspec.json.decode(parts["model"], type=_Model)
    split, after = _steps(parts.get("pre_tokenizer")), _steps(parts.get("post_processor"))
    return (
        model == _Model(ignore_merges=model.ignore_merges)
        and [step["type"] for step in _steps(parts.get("normalizer"))] in ([], ["NFC"])
        and any(step["type"] == "ByteLevel" for step in split)
        and not any(step.get("add_prefix_space") for step in split)
        and not any(step.get("trim_offsets") for step in after)
        and added.are_simple
    )


def _scheme(steps: Sequence[Mapping[str, Any]]) -> str:
    """Of which encoding's scheme a pre-tokenizer is, as far as `boundaries` speaks of it."""
    if len(steps) == 1 and steps[0].get("use_regex", True):
        return "gpt2"
    if len(steps) == 2 and not steps[1].get("use_regex", True):
        pattern = steps[0].get("pattern", {}).get("Regex")
        return "cl100k" if steps[0].get("behavior") == "Isolated" and pattern in _LIKE_CL100K else "unknown"
    return "unknown"


def _has_pieces(parts: Mapping[str, msgspec.Raw], added: AddedTokens) -> bool:
    """Whether a text's ids are those of its pieces, end to end."""
    kinds = [step["type"] for step in _steps(parts.get("normalizer"))]
    return (
        not added.any_of_single_words
        and (kinds in ([], ["NFC"]) or not added.any_normalized)
        and not any(step.get("prepend_scheme") == "first" for step in _steps(parts.get("pre_tokenizer")))
    )


def _steps(part: msgspec.Raw | None) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or post-processor."""

    def steps(value: Any) -> Iterator[dict[str, Any]]:
        if isinstance(value, dict) and value.get("type") == "Sequence":
            inner = (value.get(name) or [] for name in ("normalizers", "pretokenizers", "processors"))
            yield from (step for found in inner for one in found for step in steps(one))
        elif isinstance(value, dict):
            yield value

    return list(steps(msgspec.json.decode(part or b"null")))


class WarmingBackend:
    """The reference for the first megabyte of texts, gigatoken from then on, or at once when it is asked to `warm`."""

    def __init__(
        self, exact: TokenizersBackend, make: Callable[[], AgreeingBackend] | None, added: Sequence[str]
    ) -> None:
        self.exact = exact
        self._make = make
        self._hard_texts = [*HARD_TEXTS, "".join(added), " a ".join(added)]
        self.fast: AgreeingBackend | None = None  # gigatoken, once it is loaded
        self._num_bytes = 0

    @property
    def name(self) -> str:
        """What encodes now."""
        return "gigatoken" if self.fast is not None else "tokenizers"

    def warm(self) -> None:
        """Load gigatoken, if it takes the file and agrees on texts that are known to be hard."""
        make, self._make = self._make, None
        if make is not None:
            with contextlib.suppress(Exception):  # a pattern that it does not know: tokenizers goes on
                fast = make()
                found = fast.encode_batch(Texts(self._hard_texts))
                rows = [found.ids[a:b].tolist() for a, b in pairwise(found.offsets.tolist())]
                self.fast = fast if rows == list(map(self.exact.encode, self._hard_texts)) else None

    def encode_batch(self, texts: Texts) -> RaggedIds:
        """The ids of each text."""
        self.begin(len(texts.data))
        return (self.fast or self.exact).encode_batch(texts)

    def sizes_of(self, text: str, ids: npt.NDArray[Any]) -> npt.NDArray[np.int64] | None:
        """How many bytes of a text each of its tokens has, where these are known to be the whole text."""
        if self.fast is None or self.fast.differing_texts(Texts([text])):
            return None
        sizes: npt.NDArray[np.int64] = self.fast.fast.num_bytes[ids]
        return sizes

    def begin(self, num_bytes: int) -> None:
        """Say how much text comes now."""
        self._num_bytes += num_bytes
        if self._num_bytes > _SOON:
            self.warm()

    def trim(self) -> None:
        """Give back memory that earlier texts have left behind."""
        if self.fast is not None:
            self.fast.trim()
