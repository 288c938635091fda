"""Whose the files in a folder are: a job takes away none but its own and those of jobs before it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_identity import write_tokenizer
from test_prepare import many, store_hash, write_lines

from fastcollate.errors import InputError
from fastcollate.ingest.job import prepare


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "manifest.json", "sources.json", "lengths.npy", "skipped.txt", "mine"],
)
def test_a_folder_that_is_no_stores_is_left_as_it_is(tmp_path: Path, name: str) -> None:
    source = write_lines(tmp_path / "a.jsonl", many(5))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text('{"name": "an application"}')
    before = content(tmp_path / "mine")
    for options in ({}, {"overwrite": True}, {}):
        with pytest.raises(InputError, match=r"holds files that are not of a store|not of a token store"):
            prepare(source, tmp_path / "mine", **options)
        assert content(tmp_path / "mine") == before


def test_files_of_others_in_a_stores_folder_stay(tmp_path: Path) -> None:
    """Whatever is left of the store itself: it can be made anew there."""
    source = write_lines(tmp_path / "a.jsonl", many(50))
    prepare(source, tmp_path / "s")
    expected = store_hash(tmp_path / "s")
    for kept in (["manifest.json"], ["shard-00000.arrow"], [".lock"], ["manifest.json", "lengths.npy"]):
        for path in (tmp_path / "s").iterdir():
            if path.name not in kept:
                path.unlink()
        (tmp_path / "s" / "report.html").write_text("mine")
        prepare(source, tmp_path / "s", overwrite=True)
        assert (tmp_path / "s" / "report.html").read_text() == "mine"
        (tmp_path / "s" / "report.html").unlink()
        assert store_hash(tmp_path / "s") == expected


def tokenizer_of_the_store(root: Path) -> tuple[Any, dict[str, Any]]:
    return root / "a.jsonl", {"tokenizer": str(root / "s" / "tokenizer.json")}


def source_in_the_store(root: Path) -> tuple[Any, dict[str, Any]]:
    return [root / "a.jsonl", root / "s" / "shard-00000.arrow"], {}


def by_another_path(root: Path) -> tuple[Any, dict[str, Any]]:
    os.symlink("s", root / "link")
    return root / "link" / "skipped.txt", {}


def by_a_link(root: Path) -> tuple[Any, dict[str, Any]]:
    os.symlink(root / "s" / "sources.json", root / "b.json")
    return root / "b.json", {}


@pytest.mark.parametrize("make", [tokenizer_of_the_store, source_in_the_store, by_another_path, by_a_link])
@pytest.mark.parametrize("is_finished", [True, False])
def test_what_a_job_reads_is_never_removed(
    tmp_path: Path, make: Callable[[Path], tuple[Any, dict[str, Any]]], is_finished: bool
) -> None:
    source = write_lines(tmp_path / "a.jsonl", [*many(50), {"instruction": 5}])
    prepare(source, tmp_path / "s", tokenizer=write_tokenizer(tmp_path / "x" / "tokenizer.json"), on_error="skip")
    write_lines(tmp_path / "a.jsonl", many(20))
    (tmp_path / "s" / "tokenizer_config.json").unlink(missing_ok=True)
    if not is_finished:
        (tmp_path / "s" / "manifest.json").unlink()
    sources, options = make(tmp_path)
    before = content(tmp_path / "s")
    with pytest.raises(InputError, match=r"lies in the folder of the store, which is written anew; copy it elsewhere"):
        prepare(sources, tmp_path / "s", overwrite=is_finished, **options)
    assert content(tmp_path / "s") == before


def test_a_store_is_reused_with_the_tokenizer_that_lies_in_it(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", many(20))
    prepare(source, tmp_path / "s", tokenizer=write_tokenizer(tmp_path / "x" / "tokenizer.json"))
    assert prepare(source, tmp_path / "s", tokenizer=str(tmp_path / "s" / "tokenizer.json")).reused


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Also where the system says forever that something above it is missing, as in /proc."""
    source, real = write_lines(tmp_path / "a.jsonl", many(5)), Path.mkdir

    def refuses(path: Path, *rest: Any, **options: Any) -> None:
        if path == tmp_path / "s":
            raise OSError(number, os.strerror(number), str(path))
        real(path, *rest, **options)

    monkeypatch.setattr(Path, "mkdir", refuses)
    says = f"s: cannot be made ({os.strerror(number)}); choose a place for the store that can be written"
    for store in (tmp_path / "s", tmp_path / "s" / "t"):
        with pytest.raises(InputError, match=re.escape(says)):
            prepare(source, store)
    with pytest.raises(InputError, match=r"File name too long.*choose a shorter name"):
        prepare(source, tmp_path / ("x" * 300))
