"""The oracle against the results that the chapter prints."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from fastcollate.collate.reference import custom_collate_fn, custom_collate_with_masking_fn
from tests.chapter import (
    InstructionDataset,
    InstructionDatasetWithMasking,
    format_input,
    format_input_phi,
    format_response_phi,
)

ROWS = [[0, 1, 2, 3, 4], [5, 6], [7, 8, 9]]
PADDED = [[0, 1, 2, 3, 4], [5, 6, 50256, 50256, 50256], [7, 8, 9, 50256, 50256]]


class Words:
    """An encoder of one token a word, so that expected ids can be read off."""

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split(" ")]


def test_collate_ignores_padding_after_the_first() -> None:
    inputs, targets = custom_collate_fn(ROWS)
    assert inputs.tolist() == PADDED
    assert targets.tolist() == [[1, 2, 3, 4, 50256], [6, 50256, -100, -100, -100], [8, 9, 50256, -100, -100]]
    assert inputs.dtype == targets.dtype == torch.int64


def test_collate_cuts_to_the_limit_after_masking() -> None:
    inputs, targets = custom_collate_fn(ROWS, allowed_max_length=3, ignore_index=-1)
    assert inputs.tolist() == [row[:3] for row in PADDED]
    assert targets.tolist() == [[1, 2, 3], [6, 50256, -1], [8, 9, 50256]]


def test_limits_of_zero_and_minus_one_are_slices() -> None:
    assert custom_collate_fn(ROWS, allowed_max_length=0)[0].shape == (3, 0)
    assert custom_collate_fn(ROWS, allowed_max_length=-1)[0].shape == (3, 4)


def test_a_literal_end_of_text_is_kept_and_the_real_one_ignored() -> None:
    _, targets = custom_collate_fn([[1, 50256, 2]])
    assert targets.tolist() == [[50256, 2, -100]]
    _, targets = custom_collate_fn([[50256, 1]])
    assert targets.tolist() == [[1, 50256]]


def test_masking_ignores_the_prompt() -> None:
    _, targets = custom_collate_with_masking_fn([(3, [0, 1, 2, 3, 4]), (1, [5, 6]), (0, [7, 8, 9]), (9, [1, 2])])
    assert targets.tolist() == [
        [-100, -100, 3, 4, 50256],
        [6, 50256, -100, -100, -100],
        [-100, -100, -100, -100, -100],
        [-100, -100, -100, -100, -100],
    ]


def test_masking_writes_minus_100_whatever_the_ignore_index() -> None:
    _, targets = custom_collate_with_masking_fn([(3, [0, 1, 2, 3, 4]), (1, [5])], ignore_index=-7)
    assert targets.tolist() == [[-100, -100, 3, 4, 50256], [50256, -7, -7, -7, -7]]


def test_an_empty_row_is_legal() -> None:
    inputs, targets = custom_collate_fn([[], [1]])
    assert (inputs.tolist(), targets.tolist()) == ([[50256], [1]], [[50256], [50256]])


def test_cross_entropy_ignores_minus_100() -> None:
    logits = torch.tensor([[-1.0, 1.0], [-0.5, 1.5]])
    more = torch.tensor([[-1.0, 1.0], [-0.5, 1.5], [-0.5, 1.5]])
    assert round(cross_entropy(logits, torch.tensor([0, 1])).item(), 4) == 1.1269
    assert round(cross_entropy(more, torch.tensor([0, 1, 1])).item(), 4) == 0.7936
    assert round(cross_entropy(more, torch.tensor([0, 1, -100])).item(), 4) == 1.1269


def test_prompts() -> None:
    entry = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert format_input(entry) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Input:\n1 2"
    )
    assert format_input({**entry, "input": ""}).endswith("### Instruction:\nAdd.")
    assert format_input_phi(entry) + format_response_phi(entry) == "<|user|>\nAdd.\n1 2\n<|assistant|>:\n3"
    assert format_input_phi({**entry, "input": ""}) == "<|user|>\nAdd."


def test_data_sets_tokenize_up_front() -> None:
    data = [{"instruction": "Add.", "input": "", "output": "3 4"}]
    row = InstructionDataset(data, Words())[0]
    assert row[-2:] == [len("Response:\n3"), 1]
    masked = InstructionDatasetWithMasking(data, Words())
    assert len(masked) == 1
    assert masked[0] == (len(Words().encode(format_input(data[0]))), row)
