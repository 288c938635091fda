"""The commands around a model: train, generate, evaluate."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastcollate.cli import data as data_commands
from fastcollate.cli.app import Fields, Json, app, fail, options_from, print_json, say_next, with_options
from fastcollate.errors import InputError
from fastcollate.ingest import PrepareOptions
from fastcollate.train import AnswerOptions, TrainOptions

if TYPE_CHECKING:
    from fastcollate.plan import MixedStore

# Where they are not given: with these two cores learn two kinds of the sample's questions in two minutes or so.
SAMPLE_RUN = {"max_steps": 1500, "mask_prompt": True, "eval_every": 250}

_PREPARING = ("tokenizer", "boundary", "mask_heading", "special_text", "long_prompt", "on_error", "split", "workers")


@app.command()
@options_from(PrepareOptions, *_PREPARING)
@with_options
def train(
    context: typer.Context,
    files: Annotated[
        list[str] | None, typer.Argument(help="Files of records, as --data takes them.", show_default=False)
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Files of records; repeatable. Without --data and --store: the built-in sample, as with --max-steps "
            "1500 --mask-prompt --eval-every 250, where those are not given."
        ),
    ] = None,
    store: Annotated[
        list[str] | None,
        typer.Option(help="A prepared token store, or its URL, in place of --data.", show_default=False),
    ] = None,
    mix: Annotated[
        Path | None,
        typer.Option(
            help="A JSON file of several prepared stores, in place of --data: stores (paths from there, by name), and "
            "weights, temperature, num_rows, seed, step_rows as MixedStore takes them."
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="How a record of --data becomes text, as prepare takes it; alpaca, or preference for dpo."),
    ] = None,
    field: Fields = None,
    *,
    options: TrainOptions,
    json_output: Json = False,
    **preparing: Any,
) -> None:
    """Train GPT-2 on instruction data; everything is written under OUT. Ctrl-C leaves a checkpoint to resume from."""
    from fastcollate.train import find_checkpoint, join_ranks
    from fastcollate.train import train as run

    data = [*(files or []), *(data or [])]
    preparing |= {"template": template, "field": field}
    if store and (mix is not None or store[1:]):
        given = [*(f"--store {one}" for one in store), *([] if mix is None else [f"--mix {mix}"])]
        raise InputError(f"{' and '.join(given)}: give one store, or one --mix, which is a file that names several")
    if store or mix is not None:
        _refuse_beside("--store" if mix is None else "--mix", data, preparing, context)
    elif not data:
        options = _for_the_sample(options, context)
    preparing["template"] = template or ("preference" if options.objective == "dpo" else "alpaca")
    find_checkpoint(options)  # before anything is written
    ranks = join_ranks(options.device)
    try:
        if mix is not None:
            source: Any = _mix_of(mix, (options.batch_size or 8) * options.accumulate)
        elif store:
            source = store[0]
        else:
            source = options.out / "store"
            if ranks.is_first:
                _prepare_for_training(data, source, preparing)
            ranks.barrier()
        report = run(source, options, ranks=ranks, progress=not json_output)
    finally:
        ranks.close()
    if ranks.is_first:
        _tell(report, options, json_output)
    if report.ended == "interrupted":
        fail(f"interrupted after step {report.steps}; continue with the same command and --resume", status=130)


def _tell(report: Any, options: TrainOptions, json_output: bool) -> None:
    """What a run has come to, and what one does with it."""
    from fastcollate.progress import print_summary

    values = asdict(report)
    if json_output:
        print_json(values)
        return
    print_summary("training", {name.replace("_", " "): value for name, value in values.items() if value is not None})
    if report.ended == "interrupted":
        return
    if options.objective == "sft":
        say_next("evaluate", "--checkpoint", options.out)
    else:
        say_next("generate", "--checkpoint", options.out, "--prompt", "a question of yours")


_OF_A_MIX = ("stores", "weights", "temperature", "num_rows", "seed", "step_rows")


def _mix_of(path: Path, step_rows: int) -> MixedStore:
    """The mix that a JSON file describes; a table of weights is by steps of the run, of so many rows."""
    from fastcollate.plan import MixedStore
    from fastcollate.store import TokenStore

    try:
        asked = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _no_mix(path, getattr(error, "strerror", None) or str(error)) from error
    places = asked.pop("stores", None) if isinstance(asked, dict) else None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise _no_mix(path, "no 'stores', which is an object of names and places")
    if unknown := sorted(set(asked) - set(_OF_A_MIX)):
        raise InputError(f"{path}: has {unknown}; a mix has {', '.join(_OF_A_MIX)}")
    stores = {name: TokenStore(place if "://" in place else path.parent / place) for name, place in places.items()}
    weights = asked.get("weights")
    if isinstance(weights, dict) and any(isinstance(line, dict) for line in weights.values()):
        if wrong := [step for step in weights if not step.isdecimal()]:
            raise _no_mix(path, f"weights of step {wrong[0]!r}")
        asked["weights"] = {int(step): line for step, line in weights.items()}
        asked.setdefault("step_rows", step_rows)
    try:
        return MixedStore(stores, **asked)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _no_mix(path: Path, why: str) -> InputError:
    return InputError(
        f'{path}: no mix ({why}); write a file such as {{"stores": {{"chat": "stores/chat", "code": "stores/code"}}, '
        '"weights": {"chat": 3, "code": 1}}, or weights by step, {"0": {...}, "1000": {...}}'
    )


def _is_given(name: str, context: typer.Context) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _for_the_sample(options: TrainOptions, context: typer.Context) -> TrainOptions:
    """The options of a first run, as far as none are given."""
    if options.objective == "dpo":
        raise InputError("--objective dpo: the sample holds no pairs; give records that hold some, or --store of pairs")
    wanted = {name: value for name, value in SAMPLE_RUN.items() if not _is_given(name, context)}
    if options.epochs is not None:
        wanted.pop("max_steps", None)
    return replace(options, **wanted)  # type: ignore[arg-type]


def _refuse_beside(given: str, data: list[str], preparing: dict[str, Any], context: typer.Context) -> None:
    """A store, or a mix of some, is tokenized already: what decides how would be passed over."""
    if data:
        raise InputError(f"{data[0]} and {given}: give either files of records, or what is prepared already")
    for name, value in preparing.items():
        if _is_given(name, context):
            shown = value[0] if isinstance(value, list) else value
            raise InputError(
                f"--{name.replace('_', '-')} {shown} and {given}: that decides how records are tokenized, which a "
                "store's are; give it to fastcollate prepare"
            )


def _prepare_for_training(data: list[str], store: Path, preparing: dict[str, Any]) -> None:
    """Make the run's store, of the sample where there is nothing else."""
    from fastcollate.ingest import prepare as run

    if not data:
        store.parent.mkdir(parents=True, exist_ok=True)
        path = store.with_name("sample.jsonl")
        data_commands.write_sample(path, data_commands.SAMPLE_RECORDS)
        data = [str(path)]
    field = preparing.pop("field")
    run(data, store, fields=data_commands.parse_fields(field), **preparing)


Run = Annotated[
    Path,
    typer.Option(
        "--checkpoint",
        help="A run's directory, or a checkpoint file in it; make one with: fastcollate train --out runs/first.",
    ),
]


@app.command()
@with_options
def generate(
    checkpoint: Run,
    prompt: Annotated[str, typer.Option(help="The instruction.")],
    options: AnswerOptions,
    text: Annotated[str, typer.Option("--input", help="The instruction's input, if it has one.")] = "",
    raw: Annotated[bool, typer.Option("--raw", help="Use the prompt as it is, without the run's template.")] = False,
    json_output: Json = False,
) -> None:
    """Answer one instruction with a trained model."""
    from fastcollate.train import answer

    found = answer(checkpoint, prompt, text, options, raw=raw)
    if json_output:
        print_json(found)
    else:
        print(found["model_response"])
        say_next("evaluate", "--checkpoint", checkpoint)


@app.command()
@with_options
def evaluate(
    checkpoint: Run,
    options: AnswerOptions,
    store: Annotated[str | None, typer.Option(help="The token store, or its URL; by default the run's own.")] = None,
    split: Annotated[str, typer.Option(help="train, test or validation, as the run split its rows.")] = "test",
    limit: Annotated[int | None, typer.Option(help="Answer only so many rows.")] = None,
    answers_file: Annotated[
        Path | None,
        typer.Option("--out", help="The JSON file to write; by default answers-SPLIT.json beside the checkpoint."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Answer a split's instructions with a trained model and write the answers as JSON."""
    from fastcollate.train import answer_split

    found = answer_split(
        checkpoint, options, store=store, split=split, limit=limit, out=answers_file, progress=not json_output
    )
    if json_output:
        print_json(found)
    else:
        print(f"wrote {found['rows']} answers to {found['out']}; {found['exact']} equal the record's own")
        say_next("generate", "--checkpoint", checkpoint, "--prompt", "a question of yours")
