"""Manifests that a stranger wrote, checksum and all: refused before any file that they name is opened."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastcollate.errors import InputError
from fastcollate.store.manifest import canonical, pretty, read_manifest, verify_checksums
from fastcollate.store.store import TokenStore
from tests.helpers import write_store

ROWS = [([1, 2], [1, 2, 3]), ([0, 2], [4, 5])]


def forge(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and give it a checksum that is right."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    manifest.pop("checksum")
    manifest["checksum"] = hashlib.sha256(canonical(manifest)).hexdigest()
    (path / "manifest.json").write_bytes(pretty(manifest))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of two rows."""
    write_store(tmp_path / "store", ROWS)
    return tmp_path / "store"


@pytest.mark.parametrize("part", ["files", "shards"])
@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "shard\0", ".hidden", "a\n"]
)
def test_files_elsewhere_are_never_opened(path: Path, part: str, name: str) -> None:
    (path.parent / "secret").write_bytes((path / "shard-00000.arrow").read_bytes())
    forge(path, lambda manifest: manifest[part][0].update(name=name))
    for use in (TokenStore, verify_checksums, read_manifest):
        with pytest.raises(InputError, match=r"names a file outside its own directory .*; do not trust it"):
            use(path)


@pytest.mark.parametrize("part", ["files", "shards"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.update(evil=1), "file has a key that this release does not know .'evil'"),
        (lambda entry: entry.pop("sha256"), "file sha256 is None"),
        (lambda entry: entry.update(num_bytes="3"), "file num_bytes is '3'"),
        (lambda entry: entry.update(num_bytes=-1), "file num_bytes is -1"),
        (lambda entry: entry.update(num_bytes=True), "file num_bytes is True"),
        (lambda entry: entry.update(name=None), "file name is None"),
        (lambda entry: entry.update(sha256=["x" * 999]), "file sha256 is"),
    ],
)
def test_entries_of_another_shape(path: Path, part: str, change: Callable[[Any], object], message: str) -> None:
    forge(path, lambda manifest: change(manifest[part][0]))
    with pytest.raises(InputError, match=f"{message}.*; prepare the store again"):
        TokenStore(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(shards=5), "shards is 5"),
        (lambda m: m.update(shards=[5]), "file is 5"),
        (lambda m: m.pop("num_rows"), "num_rows is None"),
        (lambda m: m.update(num_tokens=1.5), "num_tokens is 1.5"),
        (lambda m: m.update(tokenizer=[]), r"tokenizer is \[\]"),
        (lambda m: m["tokenizer"].pop("vocab_size"), "tokenizer vocab_size is None"),
        (lambda m: m["tokenizer"].update(pad_token_id="x"), "tokenizer pad_token_id is 'x'"),
    ],
)
def test_parts_of_another_type(path: Path, change: Callable[[Any], object], message: str) -> None:
    forge(path, change)
    with pytest.raises(InputError, match=f"{message}.*; prepare the store again"):
        TokenStore(path)


def test_an_unchanged_manifest_is_read(path: Path) -> None:
    forge(path, lambda manifest: None)
    assert len(TokenStore(path)) == len(ROWS)
    assert verify_checksums(path) == []


DEPTHS = [*range(900, 1001), 5_000, 200_000]  # around the recursion limit, less what a test stands on, and far beyond


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + "1" + closing * depth


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a": ', "}")])
def test_a_manifest_that_is_nested_too_deeply_is_one_clear_error(path: Path, opening: str, closing: str) -> None:
    whole = (path / "manifest.json").read_text()
    for depth in DEPTHS:
        deep = nested(depth, opening, closing)
        for text in (deep, whole.replace('"num_rows"', f'"more": {deep}, "num_rows"', 1)):
            (path / "manifest.json").write_text(text)
            for use in (TokenStore, verify_checksums):
                with pytest.raises(InputError, match=r"manifest\.json: damaged.*; prepare the store again"):
                    use(path)


@pytest.mark.slow
def test_an_entry_nested_about_as_deep_as_can_be_read(path: Path) -> None:
    """Its checksum is right, so that it comes to be shown in a message."""
    whole = (path / "manifest.json").read_bytes()
    forged = 0
    for depth in range(900, 1000):
        (path / "manifest.json").write_bytes(whole)
        try:
            forge(path, lambda manifest: manifest["files"][0].update(name=json.loads(nested(depth))))  # noqa: B023
        except RecursionError:
            break
        forged += 1
        with pytest.raises(InputError, match=r"manifest\.json: damaged .*; prepare the store again"):
            TokenStore(path)
    assert forged
