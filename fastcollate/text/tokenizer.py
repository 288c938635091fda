"""Texts -> ragged token ids. tiktoken or tokenizers defines the ids; gigatoken is checked against it while it works.

Special tokens are never produced from a text of a record.
"""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import tiktoken

from fastcollate.errors import InputError, choice, import_extra
from fastcollate.text import boundaries
from fastcollate.text.added import search_for
from fastcollate.text.chat.ids import EncodedChats, encode_chats
from fastcollate.text.chat.rendered import Rendered
from fastcollate.text.engines.agreement import HARD_TEXTS, AgreeingBackend
from fastcollate.text.engines.backends import DifferentIdsError, Engine, RaggedIds, Texts, TiktokenBackend, TokenBounds
from fastcollate.text.engines.backends import UnencodableError as UnencodableError
from fastcollate.text.engines.gigatoken import GigatokenBackend
from fastcollate.text.engines.tokenizer_json import TokenizerJson, WarmingBackend
from fastcollate.text.saved import digest_of, find_saved, read_saved
from fastcollate.text.vocabulary import KNOWN, SCHEMES, fingerprint, load_encoding

BACKENDS = ("auto", "tiktoken", "gigatoken", "tokenizers")
_T = TypeVar("_T")
_GUARD_CHARACTERS = 16_384  # text re-encoded by the reference per block: about 1% of what the block costs
_GUARDED_SHARE = 512  # of a small block, one in so many
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary with the backend that encodes by it.

    Attributes:
        name: the encoding's name, or the path of a `tokenizer.json`.
        vocab_size: every id is below it.
        pad_token_id: the id that fills rows up: the end-of-text where no other is configured.
        end_token_id: the end-of-text id.
        fingerprint: SHA-256 over the tokens and their ranks, or see `TokenizerJson`; the name plays no part.
        special_texts: texts that name added tokens; in a record they are refused or ordinary text.
        end_text: the text that names the end-of-text.
        special_tokens: texts by the names that templates use: `bos_token`, `eos_token`, ...
        chat_templates: the tokenizer's own, by name: `default`, `tool_use`, ...; none for an encoding.
        files: what a store keeps of it, by file name; nothing for an encoding.
        json: what encodes chats; `None` for an encoding.
    """

    name: str
    _engine: Engine
    _backend: Engine | AgreeingBackend | WarmingBackend
    _scheme: str
    vocab_size: int
    pad_token_id: int
    end_token_id: int
    fingerprint: str
    special_texts: tuple[str, ...]
    end_text: str
    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    json: TokenizerJson | None = None

    @property
    def chat_template(self) -> str | None:
        """The chat template that counts where no other is asked for."""
        return self.chat_templates.get("default")

    @cached_property
    def added_token_pattern(self) -> re.Pattern[str]:
        """One search that tells whether a record's text holds the text of an added token."""
        return search_for(self.special_texts)

    @property
    def begin_text(self) -> str:
        """The token that `transformers` puts before every text, such as Llama's `<|begin_of_text|>`; or none."""
        if self.json is None:
            return ""
        first, plain = (self.json.loaded.encode("a", add_special_tokens=adds).ids[:1] for adds in (True, False))
        return "" if first == plain else str(self.json.loaded.id_to_token(first[0]))

    @property
    def begin_token_id(self) -> int:
        """The id that documents begin with: of `begin_text`, or the end-of-text where no token begins texts."""
        if self.json is None or not self.begin_text:
            return self.end_token_id
        return int(self.json.loaded.encode("a", add_special_tokens=True).ids[0])

    @property
    def backend(self) -> str:
        """What encodes: `tiktoken`, `gigatoken` or `tokenizers`."""
        used = {self._backend.name} | ({self.json.full.name} if self.json is not None else set())
        return "gigatoken" if "gigatoken" in used else self._backend.name

    def identity(self) -> dict[str, Any]:
        """What a store records of its tokenizer; backends of one vocabulary share it, for they give the same ids."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "pad_token_id": self.pad_token_id,
            "end_token_id": self.end_token_id,
            "files": [*self.files],
        }

    def encode(self, text: str) -> list[int]:
        """The ids of one text, by the defining tokenizer; lone surrogates count as U+FFFD.

        Raises:
            UnencodableError: it fails on the text.
        """
        return _guarded(self.name, lambda: self._engine.encode(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; bytes that are not UTF-8 become U+FFFD."""
        engine = self._engine if self.json is None else self.json.full.exact
        return engine.decode([int(i) for i in ids])

    def encode_batch(self, texts: Texts | Sequence[str]) -> RaggedIds:
        """The ids of many texts, by the backend; lone surrogates count as U+FFFD.

        Raises:
            UnencodableError: it fails on some of them; says on which.
        """
        texts = texts if isinstance(texts, Texts) else Texts(texts)
        try:
            return self._encode_batch(texts)
        except UnencodableError as error:
            found: dict[int, str] = {}
            for number, text in enumerate(texts.strings()):
                try:
                    self._encode_batch(Texts([text]))
                except UnencodableError as one:
                    found[number] = str(one)
            raise UnencodableError(found or dict.fromkeys(range(len(texts)), str(error))) from error

    def encode_chats(self, chats: Sequence[Rendered], *, seed: int = 0) -> EncodedChats:
        """The ids and spans of rendered chats; `seed` draws those that are compared with the reference.

        Raises:
            InputError: an encoding has no tokens that a chat template could write.
            UnencodableError: some chats cannot be encoded; says which.
            DifferentIdsError: an id or a span differs; names the chat.
        """
        if self.json is None:
            raise InputError(f"tokenizer {self.name!r}: has no chat template; give a folder that save_pretrained wrote")
        json = self.json
        try:
            return _guarded(self.backend, lambda: encode_chats(json, chats, seed=seed))
        except UnencodableError as error:
            if error.__cause__ is None or len(chats) < 2:
                raise
            found: dict[int, str] = {}
            for number, chat in enumerate(chats):
                try:
                    self.encode_chats([chat])
                except UnencodableError as one:
                    found[number] = str(one)
            raise UnencodableError(found or dict.fromkeys(range(len(chats)), str(error))) from error

    def _encode_batch(self, texts: Texts) -> RaggedIds:
        return _guarded(self.backend, lambda: self._backend.encode_batch(texts))

    def trim(self) -> None:
        """Give back the memory of caches that have grown; call it between blocks of texts."""
        self._backend.trim()
        if self.json is not None:
            self.json.full.trim()

    def warm(self, *, chats: bool = False) -> None:
        """Load now what else the first megabyte of texts, or of chats, would: forked processes then share it."""
        if self.json is not None:
            (self.json.full if chats else self.json.plain).warm()

    @property
    def bounds_in_bytes(self) -> bool:
        """Whether `token_bounds` are in UTF-8 bytes, and not in characters."""
        return self._engine.bounds_in_bytes

    def token_bounds(self, text: str, ids: npt.NDArray[Any]) -> TokenBounds:
        """Where each token of a text, whose ids are given, begins and ends."""
        return self._engine.token_bounds(text, ids)

    def response_bounds(self, text: str, ids: npt.NDArray[Any], places: Sequence[int]) -> list[int]:
        """Where responses begin and end, in tokens: a token that holds a character of a response belongs to it.

        Args:
            text: without lone surrogates.
            ids: its ids.
            places: where the responses begin and end, by turns, in characters of `text`, ascending.
        """
        sizes = None if self.json is None else self.json.plain.sizes_of(text, ids)
        if sizes is not None:
            ends = np.cumsum(sizes)
            starts = ends - sizes
        else:
            starts, ends = self.token_bounds(text, ids)
        if sizes is not None or self.bounds_in_bytes:
            places = [len(text[:place].encode()) for place in places]
        bounds = [0]
        for number, place in enumerate(places):
            if number % 2 == 0:
                bounds.append(int(np.searchsorted(ends, place, side="right")))
            elif place > places[number - 1]:
                bounds.append(int(np.searchsorted(starts, place, side="left")))
            else:
                bounds.append(bounds[-1])  # an empty response within a token
        return bounds[1:]

    def without_end(self, parts: Sequence[str]) -> list[str]:
        """A row's texts without the end-of-text that is written at the end of its last response, if one is."""
        if len(parts) % 2:  # it ends in a prompt
            return list(parts)
        return [*parts[:-1], parts[-1].removesuffix(self.end_text)]

    def pairs_that_join(self, texts: Texts) -> list[int]:
        """Of texts that are left and right by turns, the pairs' numbers that `parts_at` does not clear."""
        return boundaries.pairs_that_join(self._scheme, texts)

    def parts_at(self, left: str, right: str) -> bool:
        """Whether `left` and `right` provably tokenize apart."""
        return boundaries.parts_at(self._scheme, left, right)

    def check(self, texts: Texts | Sequence[str], encoded: RaggedIds, *, seed: int) -> None:
        """Compare a random sample of a batch with the ids that the reference gives.

        Raises:
            DifferentIdsError: an id differs; names the text.
        """
        if self._backend.name != "gigatoken" or not texts:
            return
        chance = random.Random(seed)
        texts = texts if isinstance(texts, Texts) else Texts(texts)
        budget = min(_GUARD_CHARACTERS, 1 + len(texts.data) // _GUARDED_SHARE)
        while budget > 0:
            index = chance.randrange(len(texts))
            text = texts[index]
            budget -= len(text) + 64
            self._compare(text, encoded, index)

    def check_before_start(self) -> None:
        """Compare backend and reference on texts that are known to be hard."""
        if self._backend.name == "gigatoken":
            encoded = self.encode_batch(HARD_TEXTS)
            for index, text in enumerate(HARD_TEXTS):
                self._compare(text, encoded, index)

    def _compare(self, text: str, encoded: RaggedIds, index: int) -> None:
        found = encoded.ids[encoded.offsets[index] : encoded.offsets[index + 1]].tolist()
        try:
            expected = self.encode(text)
        except UnencodableError:  # then it cannot say
            return
        if found != expected:
            raise DifferentIdsError(
                f"gigatoken and {self._engine.name} give different ids for {text[:200]!r}: {found[:50]}, but "
                f"{expected[:50]} is right; run again with --backend {self._engine.name}, and please report the text"
            )


def _guarded(name: str, encode: Callable[[], _T]) -> _T:
    """What `encode` gives; whatever it raises, also a panic of compiled code, as one error."""
    try:
        return encode()
    except (MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit, UnencodableError, DifferentIdsError):
        raise
    except BaseException as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UnencodableError({0: f"{name} fails on the text ({reason})"}) from error


def load_tokenizer(name: str = "gpt2", backend: str = "auto") -> Tokenizer:
    """The tokenizer of an encoding of tiktoken, or of files that Hugging Face's libraries write.

    Args:
        name: `gpt2`, `r50k_base`, `p50k_base`, `cl100k_base`, `o200k_base`; or the path of a `tokenizer.json`, or of a
            folder that `save_pretrained` has written.
        backend: `auto` takes gigatoken where it is installed and supports the encoding.

    Raises:
        InputError: no such encoding, its vocabulary cannot be had, or the backend does not support it.
        MissingExtraError: the backend is not installed.
    """
    choice("backend", backend, BACKENDS)
    path = None if name in KNOWN else find_saved(name)
    return _cached(name, backend) if path is None else _cached(str(path), backend, digest_of(path))


@lru_cache(maxsize=8)
def _cached(name: str, backend: str = "auto", digest: bytes = b"") -> Tokenizer:
    """The tokenizer of a name; one of files is another when their digest is."""
    if digest:
        return _from_tokenizer_json(Path(name), backend)
    if backend == "tokenizers":
        raise InputError(f"backend {backend!r}: the encodings are tiktoken's; use auto")
    encoding = load_encoding(name)
    scheme = SCHEMES[encoding.name]
    engine, fast = TiktokenBackend(encoding), _choose_backend(backend, encoding, scheme)
    special, ranks = tuple(sorted(encoding.special_tokens_set)), fingerprint(encoding._mergeable_ranks)
    vocab_size, end = encoding.max_token_value + 1, encoding.eot_token
    text = encoding.decode([end])
    return Tokenizer(
        encoding.name, engine, fast, scheme, vocab_size, end, end, ranks, special, text, {"eos_token": text}
    )


def _choose_backend(backend: str, encoding: tiktoken.Encoding, scheme: str) -> TiktokenBackend | AgreeingBackend:
    if backend == "gigatoken":
        import_extra("gigatoken", "fast")
    elif backend == "tiktoken" or importlib.util.find_spec("gigatoken") is None:
        return TiktokenBackend(encoding)
    try:
        fast = GigatokenBackend.of_ranks(encoding, scheme)
    except RuntimeError as error:  # such as a vocabulary whose ranks have gaps
        if backend == "auto":
            return TiktokenBackend(encoding)
        reason = str(error).splitlines()[0]
        raise InputError(f"tokenizer {encoding.name!r}: gigatoken does not take it ({reason}); use tiktoken") from error
    return AgreeingBackend(fast, TiktokenBackend(encoding), fingerprint(encoding._mergeable_ranks))


def _from_tokenizer_json(path: Path, backend: str) -> Tokenizer:
    if backend == "tiktoken":
        raise InputError(f"backend {backend!r}: does not read a tokenizer.json; use auto")
    saved = read_saved(path)
    made = TokenizerJson(saved, path, backend)
    if backend == "gigatoken":
        import_extra("gigatoken", "fast")
        made.plain.warm()
        if made.plain.fast is None:
            raise InputError(f"tokenizer {str(path)!r}: gigatoken does not take it; use auto")
    end = _end_of_text(path, made.loaded, saved.names)
    pad = made.loaded.token_to_id(saved.names.get("pad_token", made.loaded.id_to_token(end)))
    return Tokenizer(
        str(path),
        made.plain.exact,
        made.plain,
        made.scheme,
        1 + max(made.loaded.get_vocab(with_added_tokens=True).values()),
        pad,
        end,
        made.fingerprint,
        tuple(sorted(made.added.control)),
        made.loaded.id_to_token(end),
        saved.names,
        saved.chat_templates,
        saved.files,
        made,
    )


def _end_of_text(path: Path, tokenizer: Any, names: Mapping[str, str]) -> int:
    """The end-of-text id: what the configuration names, else a well-known name.

    Raises:
        InputError: there is none.
    """
    for name in (names.get("eos_token", ""), *_END_OF_TEXT):
        found = tokenizer.token_to_id(name)
        if found is not None:
            return int(found)
    raise InputError(
        f"tokenizer {str(path)!r}: no end-of-text token found; "
        "name it as eos_token in a tokenizer_config.json beside it"
    )
