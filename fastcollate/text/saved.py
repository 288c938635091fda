"""A tokenizer as `save_pretrained` of transformers writes it: its files, read with distrust; nothing of them is run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec

from fastcollate.errors import InputError, nearest

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_MORE_TEMPLATES = "additional_chat_templates"  # a folder beside them; in a store a file each: it has no folders
_OTHERS = (".model", ".tiktoken")
_MOST_BYTES = 1 << 28
_CONVERT = "python -c \"from transformers import AutoTokenizer as T; T.from_pretrained('{}').save_pretrained('NEW')\""
_RANKS = (
    "python -c \"from transformers.convert_slow_tokenizer import TikTokenConverter as C; C('{}', pattern=PATTERN, "
    "extra_special_tokens=TOKENS).converted().save('tokenizer.json')\" with the pattern and special tokens that its "
    "project documents"
)


class SavedToken(msgspec.Struct, frozen=True):
    """A token beside the vocabulary; in a configuration it has no id."""

    content: str
    id: int = -1
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = True
    special: bool = False


class Saved(NamedTuple):
    """What the files say.

    Attributes:
        files: the files' content by the names that they have in a store; the first is the `tokenizer.json`.
        parts: the `tokenizer.json`, a part each.
        names: the special tokens' texts by name, such as `bos_token`.
        named: tokens of the configuration, in the order in which transformers adds those that are missing.
        chat_templates: by name, such as `default`.
    """

    files: dict[str, bytes]
    parts: dict[str, msgspec.Raw]
    names: dict[str, str]
    named: list[SavedToken]
    chat_templates: dict[str, str]


def find_saved(name: str) -> Path | None:
    """The `tokenizer.json` that a folder or file is or holds; `None` where the name is none of a file.

    Raises:
        InputError: it is another kind of tokenizer, or nothing is there; says how to convert it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / FILES[0]).is_file():
            return path / FILES[0]
        others = [p for p in sorted(path.iterdir()) if p.suffix in _OTHERS or p.name == "tekken.json"]
        if not others:
            raise InputError(f"tokenizer {name!r}: no {FILES[0]} in this folder; give one that save_pretrained wrote")
        path = others[0]
    if path.suffix == ".tiktoken":
        _convert(name, "ranks without a pattern to split texts by", _RANKS.format(path), "tokenizer.json")
    if path.suffix == ".model" or path.name == "tekken.json":
        package = "sentencepiece" if path.suffix == ".model" else "mistral-common"
        _convert(name, f"not a {FILES[0]}", f"{_CONVERT.format(path.parent)} where {package} is installed")
    if path.suffix == ".json" or path.is_file():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.parent.exists():
        _convert(name, "no such folder; a hub's name is not looked up", _CONVERT.format(name))
    if len(path.parts) > 1:
        raise InputError(f"tokenizer {name!r}: no such folder or file; {nearest(str(path))}")
    return None


def _convert(name: str, what: str, command: str, new: str = "NEW") -> NoReturn:
    raise InputError(f"tokenizer {name!r}: {what}; convert it once with {command}, then give {new}")


def read_saved(path: Path) -> Saved:
    """A `tokenizer.json` and what lies beside it.

    Raises:
        InputError: a file is malformed or too large; passing over it could choose another token than it means.
    """
    files = {FILES[0]: _content(path)}
    files |= {name: _content(path.with_name(name)) for name in FILES[1:] if path.with_name(name).is_file()}
    for place in _more_templates(path):
        files[f"chat_template_{place.stem.removeprefix('chat_template_')}.jinja"] = _content(place)
    try:
        parts = msgspec.json.decode(files[FILES[0]], type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"tokenizer {str(path)!r}: not a tokenizer.json ({error})") from error
    config, special = (_configuration(path.with_name(name), files) for name in FILES[1:3])
    try:
        if "added_tokens_decoder" not in config:  # only then it counts, as in transformers
            config = {**config, **special}
        found = _templates(config, files)
        return Saved(files, parts, *_named(config), found)
    except (msgspec.MsgspecError, ValueError, TypeError, LookupError, AttributeError) as error:
        _refuse(path.with_name(FILES[1]), error)


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise InputError(f"{path}: has more than {_MOST_BYTES:,} bytes; no file of a tokenizer has")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"tokenizer {str(path)!r}: cannot be read ({error.strerror or error})") from error


def digest_of(path: Path) -> bytes:
    """Of all files that a tokenizer is read from; one that is changed is another tokenizer."""
    found = hashlib.sha256()
    for place in [path, *(path.with_name(name) for name in FILES[1:]), *_more_templates(path)]:
        try:
            own = hashlib.sha256()
            with place.open("rb") as file:
                while chunk := file.read(1 << 20):
                    own.update(chunk)
            found.update(own.digest())
        except OSError:
            found.update(b"-")
    return found.digest()


def _more_templates(path: Path) -> list[Path]:
    """Chat templates that have names."""
    found = [*(path.parent / _MORE_TEMPLATES).glob("*.jinja"), *path.parent.glob("chat_template_*.jinja")]
    return sorted(place for place in found if place.stem.isidentifier())


def _configuration(path: Path, files: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        return msgspec.json.decode(files.get(path.name, b"{}"), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        _refuse(path, error)


def _refuse(path: Path, error: Exception) -> NoReturn:
    raise InputError(f"{path}: cannot be read as a tokenizer's configuration ({error}); mend or remove it") from error


def _named(config: Mapping[str, Any]) -> tuple[dict[str, str], list[SavedToken]]:
    """The special tokens by name; all tokens that a configuration names."""
    decoder = msgspec.convert(config.get("added_tokens_decoder") or {}, dict[int, SavedToken], strict=False)
    tokens = [decoder[number] for number in sorted(decoder)]
    names: dict[str, str] = {}
    for name, token in _special_tokens(config):
        names |= {name: token.content} if name else {}
        tokens.append(token)
    return names, [token for token in tokens if token.content]


def _special_tokens(config: Mapping[str, Any]) -> Iterator[tuple[str, SavedToken]]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    for name, value in {**named, **(extra if isinstance(extra, dict) else {})}.items():
        if isinstance(value, str | dict):
            yield name, _token(value)
    for value in extra if isinstance(extra, list) else []:
        yield "", _token(value)


def _token(value: Any) -> SavedToken:
    if isinstance(value, str):
        return SavedToken(value, special=True)
    return msgspec.structs.replace(msgspec.convert(value, SavedToken), special=True)


def _templates(config: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, str]:
    """The chat templates: files come before the configuration."""
    names = {file: re.sub(r"^chat_template_?|\.jinja$", "", file) or "default" for file in files if "jinja" in file}
    if names:
        return {name: files[file].decode() for file, name in names.items()}
    found = config.get("chat_template") or {}
    if isinstance(found, list):
        found = {item["name"]: item["template"] for item in found}
    return msgspec.convert({"default": found} if isinstance(found, str) else found, dict[str, str])
