"""The command line: parse, call, print. Each command imports what it needs when it runs, so `--help` is instant."""

from __future__ import annotations

import inspect as inspect_module
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Optional, get_type_hints

import typer

from fastcollate.check.options import MaskOptions, OrderOptions
from fastcollate.errors import InputError, MissingExtraError
from fastcollate.train.options import AnswerOptions, TrainOptions

app = typer.Typer(
    name="fastcollate",
    help="Tokenize instruction data once, then train on it without waiting for data.",
    epilog="Start with: fastcollate train --out runs/first",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

_INTERRUPTED = "interrupted; what was finished is kept"
_SAMPLE_RECORDS = 3000
_SAMPLE_STEPS = 120  # enough to see the loss fall, in a minute or two on two cores

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object and show no progress.")]


def main() -> None:
    """Run the command line; a user's mistake ends in one line on standard error and status 1, never a traceback."""
    try:
        app()
    except (InputError, MissingExtraError) as error:
        _fail(str(error))
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        _fail(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        _fail(_INTERRUPTED, status=130)
    except SystemExit as stop:
        cause = stop.__context__ and stop.__context__.__cause__
        if isinstance(cause, KeyboardInterrupt):  # typer has caught Ctrl-C, and says nothing
            _fail(_INTERRUPTED, status=130)
        raise


def _fail(message: str, status: int = 1) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def _print_json(result: Any) -> None:
    print(json.dumps(result, default=str))


def _with_options(function: Callable[..., None]) -> Callable[..., None]:
    """A command that has an option for each field of the dataclasses among `function`'s parameters.

    Name, type, default and help come from the field; the function receives each dataclass made up.
    """
    types = get_type_hints(function, include_extras=True)
    kinds: list[tuple[str, Any]] = [(name, kind) for name, kind in types.items() if is_dataclass(kind)]
    own = [p.replace(annotation=types[p.name]) for p in inspect_module.signature(function).parameters.values()]
    parameters = [part for p in own for part in (_options_of(p.annotation) if is_dataclass(p.annotation) else [p])]

    @wraps(function)
    def command(**values: Any) -> None:
        made = {name: kind(**{item.name: values.pop(item.name) for item in fields(kind)}) for name, kind in kinds}
        function(**values, **made)

    parameters.sort(key=lambda p: p.default is not p.empty)  # those without a default come first
    command.__signature__ = inspect_module.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _options_of(kind: Any) -> list[inspect_module.Parameter]:
    """A parameter for each field of an option dataclass, as typer reads them."""
    types = get_type_hints(kind)
    return [
        inspect_module.Parameter(
            item.name,
            inspect_module.Parameter.POSITIONAL_OR_KEYWORD,
            default=item.default,
            annotation=Annotated[types[item.name], typer.Option(*item.metadata["flags"], help=item.metadata["help"])],
        )
        for item in fields(kind)
    ]


def _print_version(wanted: bool) -> None:
    if wanted:
        from fastcollate import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """The options before a command."""


@app.command()
def sample(
    out: Annotated[Path, typer.Argument(help="JSON Lines file to write.")],
    num_records: Annotated[int, typer.Option(min=1, help="How many records.")] = _SAMPLE_RECORDS,
) -> None:
    """Write the built-in sample: generated instruction records to try everything with."""
    _write_sample(out, num_records)
    print(f"wrote {num_records:,} records to {out}")


def _write_sample(path: Path, num_records: int) -> None:
    """Write the sample whole or not at all, and not anew where it is there."""
    from fastcollate.sources.sample import sample_records
    from fastcollate.store.files import write_file

    content = "".join(json.dumps(record) + "\n" for record in sample_records(num_records))
    if path.is_file() and path.read_text(encoding="utf-8", errors="replace") == content:
        return
    write_file(path, content.encode())


@app.command()
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files, patterns or URLs of records: JSON, JSON Lines, CSV, Parquet, Arrow; also .gz, .zst."
        ),
    ],
    store: Annotated[Path, typer.Argument(help="Directory of the token store to write (the last argument).")],
    template: Annotated[
        str, typer.Option(help="How a record becomes text: alpaca, phi3, completion, chat, or a .jinja file.")
    ] = "alpaca",
    tokenizer: Annotated[
        str, typer.Option(help="gpt2, r50k_base, p50k_base, cl100k_base, o200k_base, or a tokenizer.json.")
    ] = "gpt2",
    backend: Annotated[
        str, typer.Option(help="auto, tiktoken or gigatoken (faster, checked against tiktoken); the ids are the same.")
    ] = "auto",
    field: Annotated[
        Optional[list[str]],  # noqa: UP045 (typer on Python 3.10)
        typer.Option(help="Where a template field comes from, as instruction=question; repeatable."),
    ] = None,
    boundary: Annotated[
        str, typer.Option(help="reference: the prompt tokenized by itself; exact: the first token of the response.")
    ] = "reference",
    on_error: Annotated[
        str, typer.Option(help="raise: stop at the first bad record; skip: list it in skipped.txt.")
    ] = "raise",
    max_length: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Limit in columns for --long-prompt and the counts; rows are stored whole."),
    ] = None,
    long_prompt: Annotated[
        str, typer.Option(help="A prompt that fills the limit: reject (a bad record), keep, or cut from the left.")
    ] = "reject",
    special_text: Annotated[
        str, typer.Option(help="A text like <|endoftext|>: reject (a bad record), or encode as ordinary text.")
    ] = "reject",
    engine: Annotated[str, typer.Option(help="local processes, or ray for a cluster.")] = "local",
    workers: Annotated[Optional[int], typer.Option(help="Worker processes; the usable cores by default.")] = None,  # noqa: UP045
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Make the store anew, whatever lies in its directory.")
    ] = False,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Refuse where another job is writing this store, instead of waiting.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Tokenize records once into a memory-mapped store; a job that was stopped continues."""
    from fastcollate.ingest.job import prepare as run
    from fastcollate.progress import print_summary

    report = run(
        sources,
        store,
        template=template,
        tokenizer=tokenizer,
        backend=backend,
        fields=_parse_fields(field),
        boundary=boundary,
        on_error=on_error,
        max_length=max_length,
        long_prompt=long_prompt,
        special_text=special_text,
        engine=engine,
        workers=workers,
        progress=not json_output,
        overwrite=overwrite,
        wait=not no_wait,
    )
    if json_output:
        _print_json(asdict(report))
    else:
        title = f"{report.store}: " + ("found unchanged" if report.reused else f"finished in {report.seconds:.1f} s")
        print_summary(title, {name.replace("_", " "): value for name, value in report.summary.items()})
        if report.skipped_report:
            print(f"skipped records are listed in {report.skipped_report}")


@app.command()
def convert(
    old: Annotated[Path, typer.Argument(help="Directory of a store that an older release wrote.")],
    new: Annotated[Path, typer.Argument(help="Directory to write, which is not there yet.")],
    json_output: Json = False,
) -> None:
    """Write an old store in today's format, in few shards; the old one is left as it is."""
    from fastcollate.store.convert import convert as run

    report = run(old, new, progress=not json_output)
    _print_json(asdict(report)) if json_output else print(report)


def _parse_fields(pairs: list[str] | None) -> dict[str, str] | None:
    fields = {}
    for pair in pairs or []:
        name, found, source = pair.partition("=")
        if not (name and found and source):
            raise InputError(f"--field {pair!r}: write it as NAME=SOURCE, such as instruction=question")
        fields[name] = source
    return fields or None


StoreFolder = Annotated[Path, typer.Argument(help="Directory of the token store.")]


@app.command()
@_with_options
def inspect(
    store: StoreFolder,
    masks: MaskOptions,
    row: Annotated[Optional[int], typer.Option(help="Show this row: text, ids, targets.")] = None,  # noqa: UP045
    report: Annotated[Optional[Path], typer.Option(help="Write a page for the browser to this file.")] = None,  # noqa: UP045
    batch_size: Annotated[int, typer.Option(help="Rows in a batch of the page's picture of an epoch.")] = 8,
    json_output: Json = False,
) -> None:
    """Show what is in a store: counts, lengths, and what is trained, also with prompts masked."""
    from fastcollate.check import counts, terminal
    from fastcollate.progress import print_summary
    from fastcollate.store.store import TokenStore

    opened = TokenStore(store)
    if row is not None:
        view = terminal.view_row(opened, row, masks)
        if json_output:
            arrays = {"inputs": view.inputs.tolist(), "targets": view.targets.tolist()}
            _print_json({**view._asdict(), **arrays})
        else:
            tokenizer, problem = counts.tokenizer_of(opened)
            terminal.print_row(view, tokenizer)
            if problem:
                print(f"note: ids only, {problem}", file=sys.stderr)
        return
    found = counts.inspect_store(opened, masks, progress=not json_output)
    if report is not None:
        from fastcollate.check.page import write_report

        write_report(opened, report, found, batch_size=batch_size)
    if json_output:
        _print_json(asdict(found))
        return
    print_summary(str(store), terminal.summary_of(found))
    print(f"\nrows by length in tokens\n{terminal.render_histogram(found.lengths)}")
    if report is not None:
        print(f"\nwrote {report}")


@app.command()
@_with_options
def verify(
    store: StoreFolder,
    order: OrderOptions,
    masks: MaskOptions,
    source: Annotated[
        Optional[list[str]],  # noqa: UP045 (typer on Python 3.10)
        typer.Option(help="A file it was prepared from, to be tokenized again with tiktoken; repeatable, in order."),
    ] = None,
    checksums: Annotated[bool, typer.Option("--checksums", help="Read every file and check its checksum.")] = False,
    json_output: Json = False,
) -> None:
    """Compare every batch of an epoch with the plain Python reference; status 1 where anything differs."""
    from fastcollate.check.reference_check import verify as run
    from fastcollate.progress import print_summary
    from fastcollate.store.store import TokenStore

    found = run(
        TokenStore(store), masks, **asdict(order), sources=source or [], checksums=checksums, progress=not json_output
    )
    if json_output:
        _print_json({"ok": found.ok, **asdict(found)})
    else:
        print_summary("verified, all identical" if found.ok else "NOT identical", found.summary())
        for problem in found.problems:
            print(problem, file=sys.stderr)
    if not found.ok:
        raise typer.Exit(1)


@app.command()
@_with_options
def bench(
    store: StoreFolder,
    order: OrderOptions,
    masks: MaskOptions,
    step_ms: Annotated[Optional[float], typer.Option(help="A training step in milliseconds.")] = None,  # noqa: UP045
    model: Annotated[
        Optional[str],  # noqa: UP045 (typer on Python 3.10)
        typer.Option(help="Measure the step of this bundled GPT-2 on this machine's CPU, such as tiny."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each contender; the median counts.")] = 5,
    json_output: Json = False,
) -> None:
    """Is the loop data-bound? Batches a second, beside the reference loop and torch's DataLoader."""
    from fastcollate.check.measure import bench as run
    from fastcollate.check.measure import print_report
    from fastcollate.store.store import TokenStore

    report = run(
        TokenStore(store), masks, **asdict(order), step_ms=step_ms, model=model, rounds=rounds, progress=not json_output
    )
    if json_output:
        _print_json(asdict(report))
    else:
        print_report(report)


@app.command()
@_with_options
def train(
    options: TrainOptions,
    data: Annotated[
        Optional[list[str]],  # noqa: UP045 (typer on Python 3.10)
        typer.Option(help="Files of records; repeatable. Without --data and --store: 120 steps of a built-in sample."),
    ] = None,
    store: Annotated[Optional[Path], typer.Option(help="A prepared token store, in place of --data.")] = None,  # noqa: UP045
    template: Annotated[str, typer.Option(help="How a record of --data becomes text: alpaca or phi3.")] = "alpaca",
    field: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Where a template field comes from, as instruction=question; repeatable."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Train GPT-2 on instruction data; everything is written under OUT. Ctrl-C leaves a checkpoint to resume from."""
    from fastcollate.progress import print_summary
    from fastcollate.train.files import find_checkpoint
    from fastcollate.train.loop import train as run
    from fastcollate.train.ranks import join_ranks

    if not (data or store or options.epochs or options.max_steps):
        options = replace(options, max_steps=_SAMPLE_STEPS)
    find_checkpoint(options)  # before anything is written
    ranks = join_ranks(options.device)
    try:
        if store is None:
            store = options.out / "store"
            if ranks.is_first:
                _prepare_for_training(data, store, template, field, options)
            ranks.barrier()
        elif data:
            raise InputError("--data and --store: give one of them")
        report = run(store, options, ranks=ranks, progress=not json_output)
    finally:
        ranks.close()
    if ranks.is_first:
        if json_output:
            _print_json(asdict(report))
        else:
            print_summary("training", {name: value for name, value in asdict(report).items() if value is not None})
    if report.ended == "interrupted":
        _fail(f"interrupted after step {report.steps}; continue with the same command and --resume", status=130)


def _prepare_for_training(
    data: list[str] | None, store: Path, template: str, field: list[str] | None, options: TrainOptions
) -> None:
    from fastcollate.ingest.job import prepare as run

    if not data:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / "sample.jsonl"
        _write_sample(path, _SAMPLE_RECORDS)
        data = [str(path)]
    run(data, store, template=template, fields=_parse_fields(field))


Run = Annotated[Path, typer.Option("--checkpoint", help="A run's directory, or a checkpoint file in it.")]


@app.command()
@_with_options
def generate(
    checkpoint: Run,
    prompt: Annotated[str, typer.Option(help="The instruction.")],
    options: AnswerOptions,
    text: Annotated[str, typer.Option("--input", help="The instruction's input, if it has one.")] = "",
    raw: Annotated[bool, typer.Option("--raw", help="Use the prompt as it is, without the run's template.")] = False,
    json_output: Json = False,
) -> None:
    """Answer one instruction with a trained model."""
    from fastcollate.train.answers import answer

    found = answer(checkpoint, prompt, text, options, raw=raw)
    if json_output:
        _print_json(found)
    else:
        print(found["model_response"])


@app.command()
@_with_options
def evaluate(
    checkpoint: Run,
    options: AnswerOptions,
    store: Annotated[Optional[Path], typer.Option(help="The token store; by default the run's own.")] = None,  # noqa: UP045
    split: Annotated[str, typer.Option(help="train, test or validation, as the run split its rows.")] = "test",
    limit: Annotated[Optional[int], typer.Option(help="Answer only so many rows.")] = None,  # noqa: UP045
    answers_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", help="The JSON file to write; by default answers-SPLIT.json beside the checkpoint."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Answer a split's instructions with a trained model and write the answers as JSON."""
    from fastcollate.progress import progress_bar
    from fastcollate.train.answers import open_split, write_answers
    from fastcollate.train.files import load_model
    from fastcollate.train.ranks import choose_device

    model, saved = load_model(checkpoint, choose_device(options.device))
    beside = checkpoint if checkpoint.is_dir() else checkpoint.parent
    opened, rows = open_split(saved, beside, store=store, split=split, limit=limit)
    path = answers_file or beside / f"answers-{split}.json"
    with progress_bar(unit="rows", progress=not json_output) as progress:
        task = progress.add_task("answering", total=len(rows))
        summary = write_answers(
            path, model, opened, rows, seed=options.seed, on_row=lambda: progress.advance(task), **options.drawing()
        )
    if json_output:
        _print_json(summary)
    else:
        print(f"wrote {summary['rows']} answers to {path}; {summary['exact']} equal the record's own")
