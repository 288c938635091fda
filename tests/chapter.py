"""The chapter's prompts and data sets, step by step: what stores are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch.utils.data import Dataset

Record = Mapping[str, Any]


class Encoder(Protocol):
    """What the data sets need of a tokenizer, such as a `tiktoken.Encoding`."""

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`."""
        ...


def format_input(entry: Record) -> str:
    """The Alpaca prompt of a record: instruction and, if there is one, input; without the response heading.

    Args:
        entry: `instruction` and `input`, both strings; an empty `input` is left out.
    """
    text = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{entry['instruction']}"
    )
    if entry["input"]:
        text += f"\n\n### Input:\n{entry['input']}"
    return text


def format_response(entry: Record) -> str:
    """The Alpaca response of a record: heading and output."""
    return f"\n\n### Response:\n{entry['output']}"


def format_input_phi(entry: Record) -> str:
    """The Phi-3 prompt of a record: the user turn, instruction and input a line each."""
    text = f"<|user|>\n{entry['instruction']}"
    if entry["input"]:
        text += f"\n{entry['input']}"
    return text


def format_response_phi(entry: Record) -> str:
    """The Phi-3 response of a record: the assistant turn."""
    return f"\n<|assistant|>:\n{entry['output']}"


class InstructionDataset(Dataset[list[int]]):
    """Every record's whole text as token ids, tokenized up front."""

    def __init__(self, data: Sequence[Record], tokenizer: Encoder) -> None:
        self.data = data
        self.encoded_texts = [tokenizer.encode(format_input(entry) + format_response(entry)) for entry in data]

    def __getitem__(self, index: int) -> list[int]:
        return self.encoded_texts[index]

    def __len__(self) -> int:
        return len(self.encoded_texts)


class InstructionDatasetWithMasking(Dataset[tuple[int, list[int]]]):
    """Like `InstructionDataset`, with the prompt's length in tokens before each row.

    The prompt is tokenized by itself, as the chapter does, so its tokens need not be a prefix of the row.
    """

    def __init__(self, data: Sequence[Record], tokenizer: Encoder) -> None:
        self.data = data
        self.prompt_lengths = []
        self.encoded_texts = []
        for entry in data:
            prompt = format_input(entry)
            self.encoded_texts.append(tokenizer.encode(prompt + format_response(entry)))
            self.prompt_lengths.append(len(tokenizer.encode(prompt)))

    def __getitem__(self, index: int) -> tuple[int, list[int]]:
        return self.prompt_lengths[index], self.encoded_texts[index]

    def __len__(self) -> int:
        return len(self.encoded_texts)
