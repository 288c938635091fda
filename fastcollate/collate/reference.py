"""The plain Python collate of the chapter, step by step: the oracle that everything else is compared with.

It is slow on purpose and shares no helper with the fast path; nothing on the fast path imports it. What it does
in corners (a literal 50256 in a text, prompt length 0, limits of 0 and -1) is the specification of
`mode="reference"`, so a corner is never mended here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
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


def custom_collate_draft_1(
    batch: Sequence[Sequence[int]], pad_token_id: int = 50256, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Step 1: pad each row to the longest.

    Returns:
        int64 `(rows, longest)`.
    """
    longest = max(len(row) + 1 for row in batch)
    rows = []
    for row in batch:
        padded = [*row, pad_token_id]
        padded += [pad_token_id] * (longest - len(padded))
        rows.append(torch.tensor(padded[:-1]))
    return torch.stack(rows).to(device)


def custom_collate_draft_2(
    batch: Sequence[Sequence[int]], pad_token_id: int = 50256, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step 2: the same inputs, and as targets the row shifted by one.

    Returns:
        inputs and targets, int64 `(rows, longest)` each.
    """
    longest = max(len(row) + 1 for row in batch)
    all_inputs, all_targets = [], []
    for row in batch:
        padded = [*row, pad_token_id]
        padded += [pad_token_id] * (longest - len(padded))
        all_inputs.append(torch.tensor(padded[:-1]))
        all_targets.append(torch.tensor(padded[1:]))
    return torch.stack(all_inputs).to(device), torch.stack(all_targets).to(device)


def custom_collate_fn(
    batch: Sequence[Sequence[int]],
    pad_token_id: int = 50256,
    ignore_index: int = -100,
    allowed_max_length: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step 3: in the targets every padding token after the first is ignored, then both are cut to the limit.

    Args:
        batch: rows of token ids, without the end-of-text.
        pad_token_id: appended to each row as end-of-text, and the padding.
        ignore_index: what replaces padding in the targets.
        allowed_max_length: columns kept; `None` keeps all.
        device: where the tensors go.

    Returns:
        inputs and targets, int64 `(rows, width)` each.
    """
    longest = max(len(row) + 1 for row in batch)
    all_inputs, all_targets = [], []
    for row in batch:
        padded = [*row, pad_token_id]
        padded += [pad_token_id] * (longest - len(padded))
        inputs = torch.tensor(padded[:-1])
        targets = torch.tensor(padded[1:])

        padding = torch.nonzero(targets == pad_token_id).squeeze()
        if padding.numel() > 1:
            targets[padding[1:]] = ignore_index

        if allowed_max_length is not None:
            inputs = inputs[:allowed_max_length]
            targets = targets[:allowed_max_length]
        all_inputs.append(inputs)
        all_targets.append(targets)
    return torch.stack(all_inputs).to(device), torch.stack(all_targets).to(device)


def custom_collate_with_masking_fn(
    batch: Sequence[tuple[int, Sequence[int]]],
    pad_token_id: int = 50256,
    ignore_index: int = -100,
    allowed_max_length: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`custom_collate_fn` for rows with a prompt length: the prompt's targets are ignored as well.

    The prompt's targets become -100 whatever `ignore_index` is.

    Args:
        batch: `(prompt length, row)` pairs.
        pad_token_id: appended to each row as end-of-text, and the padding.
        ignore_index: what replaces padding in the targets.
        allowed_max_length: columns kept; `None` keeps all.
        device: where the tensors go.

    Returns:
        inputs and targets, int64 `(rows, width)` each.
    """
    longest = max(len(row) + 1 for _, row in batch)
    all_inputs, all_targets = [], []
    for prompt_length, row in batch:
        padded = [*row, pad_token_id]
        padded += [pad_token_id] * (longest - len(padded))
        inputs = torch.tensor(padded[:-1])
        targets = torch.tensor(padded[1:])

        padding = torch.nonzero(targets == pad_token_id).squeeze()
        if padding.numel() > 1:
            targets[padding[1:]] = ignore_index
        targets[: prompt_length - 1] = -100

        if allowed_max_length is not None:
            inputs = inputs[:allowed_max_length]
            targets = targets[:allowed_max_length]
        all_inputs.append(inputs)
        all_targets.append(targets)
    return torch.stack(all_inputs).to(device), torch.stack(all_targets).to(device)


def put_end_to_end(
    packs: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]],
    capacity: int,
    longest: int,
    pad_token_id: int = 50256,
    ignore_index: int = -100,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packs of rows that were collated each in a batch of its own; the chapter has no such thing.

    Args:
        packs: inputs and targets `(1, length)` of each row of each pack.
        capacity: cells a pack.
        longest: cells that a row may take; unused cells are segments of at most as many.
        pad_token_id: fills unused inputs.
        ignore_index: fills unused targets.

    Returns:
        inputs, targets and positions, int64 `(packs, capacity)`, and the segments' bounds, int32.
    """
    inputs_lst, targets_lst, positions_lst, bounds = [], [], [], [0]
    for number, pack in enumerate(packs):
        inputs, targets, positions = [], [], []
        for row_inputs, row_targets in pack:
            row = row_inputs[0].tolist()
            inputs += row
            targets += row_targets[0].tolist()
            positions += list(range(len(row)))
            if row:
                bounds.append(number * capacity + len(inputs))
        while len(inputs) < capacity:
            unused = min(longest, capacity - len(inputs))
            inputs += [pad_token_id] * unused
            targets += [ignore_index] * unused
            positions += list(range(unused))
            bounds.append(number * capacity + len(inputs))
        inputs_lst.append(inputs)
        targets_lst.append(targets)
        positions_lst.append(positions)
    return (
        torch.tensor(inputs_lst),
        torch.tensor(targets_lst),
        torch.tensor(positions_lst),
        torch.tensor(bounds, dtype=torch.int32),
    )
