"""What a job is asked for, an option a field, declared and explained here and nowhere else; what it reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypedDict

from fastcollate.errors import InputError, choice
from fastcollate.options import explained, option

_MOST_NAMES = 64  # of fields that are counted
_WORDS = {  # as `inspect` calls the same
    "num_rows": "rows", "num_tokens": "tokens", "length_p0": "shortest", "length_p50": "median",
    "length_p100": "longest", "length_mean": "mean length", "num_skipped": "records skipped",
    "untrained_rows": "rows without a trained token, prompts masked",
    "corner_rows": "rows where reference and positional differ", "long_prompts": "prompts that fill the limit",
}  # fmt: skip


def summary_in_words(summary: Mapping[str, Any]) -> dict[str, object]:
    """A job's summary by the names that every command gives these numbers; shares as percentages.

    Example:
        >>> summary_in_words({"num_rows": 9, "length_p95": 287, "padding_8_random": 0.334})
        {'rows': 9, 'percentile 95': 287, 'padding, 8 rows a batch, shuffled': '33.4%'}
    """
    found: dict[str, object] = {}
    for key, value in summary.items():
        kind, _, rest = key.partition("_")
        if kind == "padding":
            size, _, policy = rest.partition("_")
            policy = policy.replace("random", "shuffled")
            found[f"padding, {size} rows a batch, {policy}"] = f"{value:.1%}"
        elif key == "dropped_fields":
            told = (f"{name} ({count:,} record{'s' * (count > 1)})" for name, count in value.items())
            found["fields whose text is in no row"] = ", ".join(told)
        else:
            name = _WORDS.get(key, key.replace("length_p", "percentile ").replace("_", " "))
            found[name] = f"{value:.1f}" if key == "length_mean" else value
    return found


class PrepareKeywords(TypedDict, total=False):
    """The keyword arguments of a job; `PrepareOptions` explains them."""

    template: str
    tokenizer: str
    backend: str
    end: str
    train_on: str
    mask_heading: bool
    date: str | None
    boundary: str
    on_error: str
    max_length: int | None
    long_prompt: str
    special_text: str
    allow_special: str | None
    split: str | None
    engine: str
    workers: int | None
    overwrite: bool
    wait: bool


@explained
@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOptions:
    """How records become a store.

    Raises:
        InputError: a value is none of those that its option knows.

    Example:
        >>> PrepareOptions(template="phi3", workers=2).boundary
        'reference'
    """

    template: str = option(
        "auto",
        "How a record becomes text: auto (by the first record's fields), tokenizer (the chat template that comes with "
        "it), alpaca, phi3, completion, text, document, chat (ChatML), or a .jinja file; tokenized: it holds ids "
        "already; preference, or preference:alpaca and the like: pairs of chosen and rejected answers.",
    )
    tokenizer: str = option(
        "auto",
        "gpt2 (auto for texts), r50k_base, p50k_base, cl100k_base, o200k_base, a tokenizer.json, or a folder of "
        "save_pretrained.",
    )
    backend: str = option(
        "auto", "auto, tiktoken, tokenizers or gigatoken (faster, checked against the others); the ids are the same."
    )
    end: str = option(
        "auto",
        "What ends a row: in_row, what a chat template writes; append, an end-of-text; auto goes by the template.",
        choices=("auto", "append", "in_row"),
    )
    train_on: str = option("all", "Of a chat: all answers, or the last one.", choices=("all", "last"))
    mask_heading: bool = option(
        False, "Do not train the constant heading of a response, such as alpaca's.", "--mask-heading"
    )
    date: str | None = option(None, "The date that a chat template may write, as 2026-01-31.")
    boundary: str = option(
        "reference",
        "reference: the length of the prompt tokenized by itself; exact: the response begins at the first token that "
        "holds a character of it.",
        choices=("reference", "exact"),
    )
    on_error: str = option(
        "raise",
        "raise: stop at the first bad record; skip: list it in skipped.txt and go on. What is finished before a bad "
        "record is kept for the next call, also for one that skips.",
        choices=("raise", "skip"),
    )
    max_length: int | None = option(None, "Limit in columns for --long-prompt and the counts; rows are stored whole.")
    long_prompt: str = option(
        "reject",
        "A prompt that fills the limit: reject (a bad record), keep, or cut (from the left).",
        choices=("reject", "keep", "cut"),
    )
    special_text: str = option(
        "reject",
        "A text like <|endoftext|>: reject (a bad record), encode as text, or strip-end: drop the one at a row's end.",
        choices=("reject", "encode", "strip-end"),
    )
    split: str | None = option(None, "The split to take, where a source is a dictionary of splits.")
    allow_special: str | None = option(
        None,
        "Texts of added tokens, with blanks between them, that stand for these in what the assistant says; by default "
        "the tags of thoughts and tool calls.",
    )
    engine: str = option("local", "local processes, or ray for a cluster.", choices=("local", "ray"))
    workers: int | None = option(None, "Worker processes; the usable cores by default.")
    overwrite: bool = option(False, "Make the store anew, whatever lies in its directory.", "--overwrite")
    wait: bool = option(True, "Wait where another job is writing this store, or refuse.", "--wait/--no-wait")

    def __post_init__(self) -> None:
        for item in fields(self):
            if choices := item.metadata["choices"]:
                choice(item.name, getattr(self, item.name), choices)
        if self.workers is not None and self.workers < 1:
            raise InputError(f"workers={self.workers}: give at least 1")


@dataclass(slots=True)
class Counts:
    """Sums over rows, for the report; the same whatever the number of workers.

    Attributes:
        num_rows: rows stored.
        num_tokens: tokens in them.
        boundary_mismatches: rows whose prompt's tokens are not a prefix of the row's.
        untrained_rows: rows without a trained token within the limit.
        corner_rows: rows on which reference and positional mode differ.
        long_prompts: rows whose prompt fills the limit, kept or cut.
        dropped_fields: records by the name of a field whose text is in no row; see `Template.dropped`.
    """

    num_rows: int = 0
    num_tokens: int = 0
    boundary_mismatches: int = 0
    untrained_rows: int = 0
    corner_rows: int = 0
    long_prompts: int = 0
    dropped_fields: dict[str, int] = field(default_factory=dict)

    def add(self, other: Counts) -> None:
        """Add another unit's counts."""
        for name, value in asdict(other).items():
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
        for name, count in other.dropped_fields.items():
            self.add_dropped([name], count)

    def add_dropped(self, names: Iterable[str], count: int = 1) -> None:
        """Note fields of a record that are not in its text; of very many names the last ones stand together."""
        noted = self.dropped_fields
        for name in names:
            key = name if name in noted or len(noted) < _MOST_NAMES else "other fields"
            noted[key] = noted.get(key, 0) + count


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What a job did: the store's directory, whether one was found and left as it is, the seconds.

    Attributes:
        tokenize_seconds: time inside the tokenizer, summed over workers; 0 for what an earlier run has done.
        backend: what tokenized.
        summary: counts, length percentiles, padding to expect; as in the manifest.
        skipped_report: the file that lists skipped records, or `None`.
        template: the template, and why it was chosen where it was not asked for.
    """

    store: str
    reused: bool
    seconds: float
    tokenize_seconds: float
    backend: str
    summary: dict[str, Any]
    skipped_report: str | None
    template: str = ""

    @property
    def num_rows(self) -> int:
        """Rows stored."""
        return int(self.summary["num_rows"])

    @property
    def title(self) -> str:
        """What became of the store, in words."""
        return f"{self.store}: " + ("found unchanged" if self.reused else f"finished in {self.seconds:.1f} s")

    def __str__(self) -> str:
        """A line a figure."""
        return "\n".join(
            [
                self.title,
                f"  template: {self.template}",
                *(f"  {name}: {value}" for name, value in summary_in_words(self.summary).items()),
            ]
        )
