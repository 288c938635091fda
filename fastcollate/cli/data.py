"""The commands around a store: sample, prepare, convert, push, pull, inspect, verify, bench."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastcollate.cli.app import Fields, Json, app, print_json, say_next, telling_of_kernels, with_options
from fastcollate.errors import InputError, import_extra
from fastcollate.ingest import PrepareOptions, summary_in_words
from fastcollate.options import local_path
from fastcollate.train import MaskOptions, OrderOptions

if TYPE_CHECKING:
    from fastcollate.store import TokenStore

SAMPLE_RECORDS = 3000


@app.command()
def sample(
    out: Annotated[Path, typer.Argument(help="JSON Lines file to write.")],
    num_records: Annotated[int, typer.Option(min=1, help="How many records.")] = SAMPLE_RECORDS,
) -> None:
    """Write the built-in sample: generated instruction records to try everything with."""
    write_sample(out, num_records)
    print(f"wrote {num_records:,} records to {out}")
    say_next("prepare", out, "store")


def write_sample(path: Path, num_records: int) -> None:
    """Write the sample whole or not at all, and not anew where it is there."""
    from fastcollate.sources import sample_records
    from fastcollate.store import files

    content = "".join(json.dumps(record) + "\n" for record in sample_records(num_records))
    if path.is_file() and path.read_text(encoding="utf-8", errors="replace") == content:
        return
    files.write_file(path, content.encode())


@app.command()
@with_options
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files, patterns or URLs: JSON, JSON Lines, CSV, Parquet, Arrow; also .gz, .zst, .bz2, .xz.",
            default_factory=list,  # a lone argument is taken for the store: said below, better than by "missing"
            show_default=False,
        ),
    ],
    store: Annotated[
        str,
        typer.Argument(help="Directory of the token store to write, or its URL in object storage (the last one)."),
    ],
    options: PrepareOptions,
    field: Fields = None,
    template_arg: Annotated[
        list[str] | None,
        typer.Option(help="An argument of a chat template, as enable_thinking=false; repeatable.", show_default=False),
    ] = None,
    json_output: Json = False,
) -> None:
    """Tokenize records once into a memory-mapped store; a job that was stopped continues."""
    from fastcollate.ingest import prepare as run
    from fastcollate.progress import print_summary
    from fastcollate.sources import remote

    if not sources:
        given = remote.name_of(store)
        raise InputError(
            f"prepare got only {given!r}: name the sources first, the store's directory last, such as: "
            f"fastcollate prepare {given} store"
        )
    # the options' own keywords, which a type checker cannot know of a dataclass
    names, arguments = parse_fields(field), _parse_arguments(template_arg)
    report = run(sources, store, fields=names, template_args=arguments, progress=not json_output, **asdict(options))
    if json_output:
        print_json(asdict(report))
    elif report.reused:
        print(f"{report.title}; {report.num_rows:,} rows")
    else:
        print_summary(report.title, {"template": report.template, **summary_in_words(report.summary)})
        if report.skipped_report:
            print(f"skipped records are listed in {report.skipped_report}")
    if not json_output:
        say_next("inspect", store)


@app.command()
def convert(
    old: Annotated[Path, typer.Argument(help="Directory of a store that an older release wrote.")],
    new: Annotated[Path, typer.Argument(help="Directory to write, which is not there yet.")],
    json_output: Json = False,
) -> None:
    """Write an old store in today's format, in few shards; the old one is left as it is."""
    from fastcollate.store import convert as run

    _tell_of_copy(run(old, new, progress=not json_output), new, json_output)


def _tell_of_copy(report: Any, to: object, json_output: bool) -> None:
    """The end of a command that has copied a store."""
    if json_output:
        print_json(asdict(report))
    else:
        print(report)
        say_next("verify", to)


@app.command()
def push(
    directory: Annotated[Path, typer.Argument(help="Directory of a finished store.")],
    url: Annotated[str, typer.Argument(help="Where to copy it, such as s3://bucket/store.")],
    json_output: Json = False,
) -> None:
    """Copy a store to object storage, every file checked; stopped, the same command goes on."""
    from fastcollate.store import remote

    report = remote.push(directory, url, progress=not json_output)
    _tell_of_copy(report, report.store, json_output)


@app.command()
def pull(
    url: Annotated[str, typer.Argument(help="Where the store lies, such as s3://bucket/store.")],
    directory: Annotated[Path, typer.Argument(help="Directory to copy it to.")],
    json_output: Json = False,
) -> None:
    """Copy a store from object storage, every file checked; stopped, the same command goes on."""
    from fastcollate.store import remote

    report = remote.pull(url, directory, progress=not json_output)
    _tell_of_copy(report, directory, json_output)


def parse_fields(pairs: list[str] | None) -> dict[str, str] | None:
    """`NAME=SOURCE` pairs, of `--field`, as a mapping."""
    fields = {}
    for pair in pairs or []:
        name, found, source = pair.partition("=")
        if not (name and found and (source or name == "prompt")):  # none: both answers of a pair repeat it
            raise InputError(f"--field {pair!r}: write it as NAME=SOURCE, such as instruction=question")
        fields[name] = source
    return fields or None


def _parse_arguments(pairs: list[str] | None) -> dict[str, object]:
    """`NAME=VALUE` pairs, of `--template-arg`; a value is JSON, else a text."""
    found: dict[str, object] = {}
    for pair in pairs or []:
        name, sign, value = pair.partition("=")
        if not (name and sign):
            raise InputError(f"--template-arg {pair!r}: write it as NAME=VALUE, such as enable_thinking=false")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


StoreFolder = Annotated[str, typer.Argument(help="Directory of the token store, or its URL (see docs/remote.md).")]


@app.command()
@with_options
def inspect(
    store: StoreFolder,
    masks: MaskOptions,
    row: Annotated[
        int | None, typer.Option(help="Show this row: text, ids, targets; with --report, in the page.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page for the browser to this file.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows in a batch of the page's picture of an epoch.")] = 8,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks to tell the balance of.")] = 8,
    json_output: Json = False,
) -> None:
    """Show what is in a store: counts, lengths, and what is trained, also with prompts masked."""
    from fastcollate.check import inspect_store, print_inspection, print_row, view_row, write_report
    from fastcollate.store import TokenStore

    opened, page = TokenStore(store), local_path(report) if report is not None else None
    if page is not None:
        import_extra("matplotlib", "report")  # before anything takes long
    if row is not None and page is None:
        view = view_row(opened, row, masks)
        if json_output:
            turns = [turn._asdict() for turn in view.turns]
            arrays = {"inputs": view.inputs.tolist(), "targets": view.targets.tolist()}
            print_json({**view._asdict(), **arrays, "turns": turns})
        else:
            if problem := print_row(opened, view):
                print(f"note: ids only, {problem}", file=sys.stderr)
            say_next("inspect", opened.path, "--row", (row + 1) % len(opened), *["--mask-prompt"] * masks.mask_prompt)
        return
    with telling_of_kernels(quiet=json_output):
        found = inspect_store(opened, masks, ranks=ranks, progress=not json_output)
        if page is not None:
            write_report(opened, page, found, batch_size=batch_size, row=row)
    if json_output:
        print_json(asdict(found))
        return
    print_inspection(found)
    if page is not None:
        print(f"\nwrote {page}")
    say_next("verify", opened.path, "--checksums")


@app.command()
@with_options
def verify(
    store: StoreFolder,
    order: OrderOptions,
    masks: MaskOptions,
    source: Annotated[
        list[str] | None,
        typer.Option(help="A file it was prepared from, to be tokenized again with tiktoken; repeatable, in order."),
    ] = None,
    more: Annotated[
        list[str] | None,
        typer.Argument(help="Further sources, as a shell makes them of: --source folder/*.jsonl", show_default=False),
    ] = None,
    checksums: Annotated[bool, typer.Option("--checksums", help="Read every file and check its checksum.")] = False,
    json_output: Json = False,
) -> None:
    """Compare every batch of an epoch with the plain Python reference; status 1 where anything differs."""
    from fastcollate.check import verify as run
    from fastcollate.progress import print_summary
    from fastcollate.store import TokenStore

    folders = [store, *(more or [])]
    is_store = "://" in folders[-1] or Path(folders[-1], "manifest.json").is_file()
    if more and (not source or not is_store):
        folders = [*folders[1:], folders[0]]  # the store is named first
    *sources, folder = folders
    sources, opened = [*(source or []), *sources], TokenStore(folder)
    with telling_of_kernels(quiet=json_output):
        found = run(opened, masks, order, sources=sources, checksums=checksums, progress=not json_output)
    if json_output:
        print_json({"ok": found.ok, **asdict(found)})
    else:
        print_summary("verified, all identical" if found.ok else "NOT identical", found.summary())
        for problem in found.problems:
            print(problem, file=sys.stderr)
        if found.ok:
            _say_train(opened)
    if not found.ok:
        raise typer.Exit(1)


def _say_train(store: TokenStore) -> None:
    """What one does with a store that is as it should be; of answers with verdicts that is not a command."""
    if store.kind == "pairs":
        say_next("train", "--store", store.path, "--objective", "dpo", "--reference-checkpoint", "runs/first")
    elif store.kind != "answers":
        say_next("train", "--store", store.path)


@app.command()
@with_options
def bench(
    store: StoreFolder,
    order: OrderOptions,
    masks: MaskOptions,
    step_ms: Annotated[float | None, typer.Option(help="A training step in milliseconds.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Measure the step of this bundled GPT-2 on this machine's CPU, such as tiny.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each contender; the median counts.")] = 5,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks to tell the balance of.")] = 8,
    json_output: Json = False,
) -> None:
    """Is the loop data-bound? Batches a second, beside the reference loop and torch's DataLoader."""
    from fastcollate.check import bench as run
    from fastcollate.check import print_report
    from fastcollate.store import TokenStore

    opened = TokenStore(store)
    with telling_of_kernels(quiet=json_output):
        report = run(
            opened, masks, order, step_ms=step_ms, model=model, rounds=rounds, ranks=ranks, progress=not json_output
        )
    if json_output:
        print_json(asdict(report))
    else:
        print_report(report)
        if report.step_ms:
            _say_train(opened)
        else:
            say_next("bench", opened.path, "--model", "tiny")
