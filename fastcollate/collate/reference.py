"""The plain Python collate of the chapter, step by step: the oracle that everything else is compared with.

It is slow on purpose and shares no helper with the fast path; nothing on the fast path imports it. What it does
in corners (a literal 50256 in a text, prompt length 0, limits of 0 and -1) is the specification of
`mode="reference"`, so a corner is never mended here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def custom_collate_fn(
    batch: Sequence[Sequence[int]],
    pad_token_id: int = 50256,
    ignore_index: int = -100,
    allowed_max_length: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad each row, shift the targets, ignore every padding token after the first in them, then cut both.

    Args:
        batch: rows of token ids, without the end-of-text.
        pad_token_id: appended to each row as end-of-text, and the padding.
        ignore_index: what replaces padding in the targets.
        allowed_max_length: columns kept; `None` keeps all.
        device: where the tensors go.

    Returns:
        inputs and targets, int64 `(rows, width)` each.
    """
    return _collate(batch, None, pad_token_id, ignore_index, allowed_max_length, device)


def custom_collate_with_masking_fn(
    batch: Sequence[tuple[int, Sequence[int]]],
    pad_token_id: int = 50256,
    ignore_index: int = -100,
    allowed_max_length: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`custom_collate_fn` for rows with a prompt length: the prompt's targets are ignored as well.

    They become -100 whatever `ignore_index` is. The batch holds `(prompt length, row)` pairs.
    """
    lengths, rows = zip(*batch, strict=True)
    return _collate(rows, lengths, pad_token_id, ignore_index, allowed_max_length, device)


def _collate(
    rows: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int] | None,
    pad_token_id: int,
    ignore_index: int,
    allowed_max_length: int | None,
    device: torch.device | str,
) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(row) + 1 for row in rows)
    all_inputs, all_targets = [], []
    for number, row in enumerate(rows):
        padded = [*row, pad_token_id]
        padded += [pad_token_id] * (longest - len(padded))
        inputs = torch.tensor(padded[:-1])
        targets = torch.tensor(padded[1:])

        padding = torch.nonzero(targets == pad_token_id).squeeze()
        if padding.numel() > 1:
            targets[padding[1:]] = ignore_index
        if prompt_lengths is not None:
            targets[: prompt_lengths[number] - 1] = -100

        if allowed_max_length is not None:
            inputs = inputs[:allowed_max_length]
            targets = targets[:allowed_max_length]
        all_inputs.append(inputs)
        all_targets.append(targets)
    return torch.stack(all_inputs).to(device), torch.stack(all_targets).to(device)


def collate_in_row(
    batch: Sequence[Sequence[int]],
    spans: Sequence[Sequence[int]] | None,
    pad_token_id: int,
    ignore_index: int = -100,
    max_length: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that hold their own end, which the chapter does not know: inputs are `ids[:-1]`, targets `ids[1:]`.

    Args:
        batch: rows of token ids.
        spans: where prompts are masked, alternating counts of prompt and response ids of each row, prompt first.
        pad_token_id: fills unused inputs.
        ignore_index: fills unused targets, and those that are ids of a prompt.
        max_length: columns kept; `None` keeps all.

    Returns:
        inputs and targets, int64 `(rows, width)` each.
    """
    columns = [max(len(ids) - 1, 0) for ids in batch]
    inputs = torch.full((len(batch), max(columns)), pad_token_id)
    targets = torch.full((len(batch), max(columns)), ignore_index)
    for row, ids in enumerate(batch):
        trained = [True] * len(ids)
        if spans is not None:
            trained = [place % 2 == 1 for place, count in enumerate(spans[row]) for _ in range(count)]
        for column in range(columns[row]):
            inputs[row, column] = ids[column]
            if trained[column + 1]:
                targets[row, column] = ids[column + 1]
    return inputs[:, :max_length], targets[:, :max_length]


def pad_columns(
    inputs: torch.Tensor, targets: torch.Tensor, multiple: int, pad_token_id: int = 50256, ignore_index: int = -100
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch with columns of padding behind it until their number is a multiple; the chapter has no such thing."""
    while inputs.shape[1] % multiple:
        inputs = torch.cat([inputs, torch.full_like(inputs[:, :1], pad_token_id)], dim=1)
        targets = torch.cat([targets, torch.full_like(targets[:, :1], ignore_index)], dim=1)
    return inputs, targets


def put_end_to_end(
    packs: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]],
    capacity: int,
    longest: int,
    pad_token_id: int = 50256,
    ignore_index: int = -100,
    cp_size: int | None = None,
    max_segments: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """Packs of rows that were collated each in a batch of its own; the chapter has no such thing.

    Args:
        packs: inputs and targets `(1, length)` of each row of each pack.
        capacity: cells a pack.
        longest: cells that a row may take; unused cells are segments of at most as many.
        pad_token_id: fills unused inputs.
        ignore_index: fills unused targets.
        cp_size: each segment's cells are a multiple of twice this, padded where they are fewer.
        max_segments: the last bound is repeated until there are so many segments.

    Returns:
        inputs, targets and positions, int64 `(packs, capacity)`, and the segments' bounds, int32; with `cp_size` the
        tokens up to each bound before these, int32.
    """
    inputs_lst, targets_lst, positions_lst, bounds, tokens = [], [], [], [0], [0]
    multiple = 1 if cp_size is None else 2 * cp_size
    while longest % multiple:
        longest += 1
    for number, pack in enumerate(packs):
        inputs, targets, positions = [], [], []
        for row_inputs, row_targets in pack:
            if row_inputs.numel():
                tokens.append(tokens[-1] + row_inputs.numel())
            padded = pad_columns(row_inputs, row_targets, multiple, pad_token_id, ignore_index)
            row, row_labels = (tensor[0].tolist() for tensor in padded)
            inputs += row
            targets += row_labels
            positions += list(range(len(row)))
            if row:
                bounds.append(number * capacity + len(inputs))
        while len(inputs) < capacity:
            unused = min(longest, capacity - len(inputs))
            inputs += [pad_token_id] * unused
            targets += [ignore_index] * unused
            positions += list(range(unused))
            bounds.append(number * capacity + len(inputs))
            tokens.append(tokens[-1])
        inputs_lst.append(inputs)
        targets_lst.append(targets)
        positions_lst.append(positions)
    while max_segments is not None and len(bounds) <= max_segments:
        bounds.append(bounds[-1])
        tokens.append(tokens[-1])
    cells = (torch.tensor(inputs_lst), torch.tensor(targets_lst), torch.tensor(positions_lst))
    counts = [tokens, bounds] if cp_size is not None else [bounds]
    return (*cells, *(torch.tensor(count, dtype=torch.int32) for count in counts))
