"""GPT-2 against `transformers`, packed against padded, published files in and wrong files out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastcollate.errors import InputError
from fastcollate.train.loss import cell_losses, scaled_loss, trained_cells
from fastcollate.train.model import CONFIGS, GPT2, GPT2Config, KeyValueCache, config_of, load_published

SMALL = GPT2Config(num_layers=3, num_heads=4, width=32, vocab_size=101, context_length=64)


def theirs(config: GPT2Config) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_length,
            n_embd=config.width,
            n_layer=config.num_layers,
            n_head=config.num_heads,
        )
    ).eval()
    for parameter in model.parameters():  # biases and norms too: zeros and ones would hide a swap
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_published_weights_give_the_logits_of_transformers(
    tmp_path: Path, prefix: str, kind: str, tie_weights: bool
) -> None:
    model = theirs(SMALL)
    tensors = {prefix + n.removeprefix("transformer."): t.contiguous() for n, t in model.state_dict().items()}
    del tensors[f"{prefix}lm_head.weight"]
    tensors[f"{prefix}h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()  # the published files hold the mask too
    path = tmp_path / f"model.{kind}"
    if kind == "bin":
        torch.save(tensors, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(tensors, path)
    ours = load_published(path, replace(SMALL, tie_weights=tie_weights)).eval()
    inputs = torch.randint(101, (3, 50))
    with torch.no_grad():
        torch.testing.assert_close(ours(inputs), model(inputs).logits, rtol=0, atol=1e-5)


def test_wrong_files_are_refused_with_the_remedy(tmp_path: Path) -> None:
    good = GPT2(SMALL).state_dict()
    for name in list(good):
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            good[name] = good[name].T.contiguous()
    path = tmp_path / "model.bin"
    with pytest.raises(InputError, match="no such file"):
        load_published(tmp_path / "absent.bin", SMALL)
    path.write_bytes(b"no weights")
    with pytest.raises(InputError, match="not a PyTorch file of tensors"):
        load_published(path, SMALL)
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    pytest.importorskip("safetensors")
    with pytest.raises(InputError, match="not a safetensors file"):
        load_published(tmp_path / "bad.safetensors", SMALL)
    torch.save(good | {"wpe.weight": torch.zeros(65, 32)}, path)
    with pytest.raises(InputError, match=r"'wpe.weight' is \(65, 32\), the model needs \(64, 32\)"):
        load_published(path, SMALL)
    torch.save({n: t for n, t in good.items() if n != "ln_f.bias"}, path)
    with pytest.raises(InputError, match=r"no tensor 'ln_f.bias'"):
        load_published(path, SMALL)
    torch.save(good, path)
    assert load_published(path, SMALL).config == SMALL
    with pytest.raises(InputError, match="3 layers, the model has 2"):
        load_published(path, replace(SMALL, num_layers=2))


def test_a_file_that_holds_code_is_refused(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "was run",))

    torch.save({"wte.weight": Code()}, tmp_path / "model.bin")
    with pytest.raises(InputError, match="tensors alone"):
        load_published(tmp_path / "model.bin", SMALL)
    assert not (tmp_path / "was run").exists()


@pytest.mark.slow
def test_configurations_have_the_published_sizes() -> None:
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in GPT2(config).parameters()) for name, config in CONFIGS.items()}
    assert sizes == {
        "tiny": 3_382_080,
        "124M": 124_439_808,
        "355M": 354_823_168,
        "774M": 774_030_080,
        "1558M": 1_557_611_200,
    }
    with pytest.raises(InputError, match="'125M': choose one of tiny, 124M"):
        config_of("125M")


def rows_of(lengths: list[int], vocab_size: int) -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randint(vocab_size, (length + 1,)) for length in lengths]


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    width = max(len(row) - 1 for row in rows)
    inputs, targets = torch.zeros(len(rows), width, dtype=torch.int64), torch.full((len(rows), width), -100)
    for i, row in enumerate(rows):
        inputs[i, : len(row) - 1] = row[:-1]
        targets[i, : len(row) - 1] = row[1:]
    targets[:, :2] = -100  # as a masked prompt
    return inputs, targets


def packed(rows: list[Tensor], packs: list[list[int]], capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, positions = torch.zeros(len(packs), capacity, dtype=torch.int64), torch.zeros(len(packs), capacity).long()
    targets, ends = torch.full((len(packs), capacity), -100), [0]
    for p, pack in enumerate(packs):
        at = 0
        for row in (rows[i] for i in pack):
            cells = slice(at, at + len(row) - 1)
            inputs[p, cells], targets[p, cells] = row[:-1], row[1:]
            targets[p, at : at + 2] = -100
            positions[p, cells] = torch.arange(len(row) - 1)
            at = cells.stop
            ends.append(p * capacity + at)
        positions[p, at:] = torch.arange(capacity - at)
        if at < capacity:
            ends.append((p + 1) * capacity)
    return inputs, targets, positions, torch.tensor(ends, dtype=torch.int32)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_packed_losses_and_gradients_equal_padded(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    model = GPT2(SMALL).to(dtype)
    rows = rows_of([13, 7, 30, 1, 22, 40, 5], SMALL.vocab_size)
    inputs, targets = padded(rows)
    plain = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="none")
    by_row = plain.view(targets.shape)
    num_trained = int((targets != -100).sum())
    (plain.sum() / num_trained).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()

    packs = [[0, 1, 2], [5], [4, 3, 6]]
    inputs, targets_packed, positions, cu_seqlens = packed(rows, packs, 50)
    hidden = model.hidden(inputs, positions, cu_seqlens).flatten(0, 1)
    cells, labels = trained_cells(targets_packed)
    order = [i for pack in packs for i in pack]
    wanted = torch.cat([by_row[i][targets[i] != -100] for i in order])
    losses = cell_losses(hidden[cells], model.head_weight, labels, chunk=16)
    torch.testing.assert_close(losses, wanted.detach(), rtol=0, atol=tolerance)
    loss = scaled_loss(hidden[cells], model.head_weight, labels, 1 / num_trained, chunk=16)
    torch.testing.assert_close(loss, plain.sum() / num_trained, rtol=0, atol=tolerance)
    loss.backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=tolerance)


def test_a_segment_does_not_see_its_neighbours() -> None:
    torch.manual_seed(0)
    model = GPT2(SMALL).eval()
    rows = rows_of([10, 10], SMALL.vocab_size)
    inputs, _, positions, cu_seqlens = packed(rows, [[0, 1]], 20)
    changed = inputs.clone()
    changed[0, :10] = (changed[0, :10] + 1) % SMALL.vocab_size
    with torch.no_grad():
        before, after = model(inputs, positions, cu_seqlens), model(changed, positions, cu_seqlens)
    assert torch.equal(before[0, 10:], after[0, 10:])
    assert not torch.allclose(before[0, :10], after[0, :10])


@pytest.mark.parametrize("tie_weights", [True, False])
def test_cached_generation_gives_the_same_logits(tie_weights: bool) -> None:
    torch.manual_seed(0)
    model = GPT2(replace(SMALL, tie_weights=tie_weights)).eval()
    ids = torch.randint(101, (1, 20))
    with torch.no_grad():
        cache = KeyValueCache(SMALL, 20, like=model.head_weight)
        parts = [model.hidden(ids[:, :12], cache=cache)]
        parts += [model.hidden(ids[:, i : i + 1], cache=cache) for i in range(12, 20)]
        torch.testing.assert_close(torch.cat(parts, 1), model.hidden(ids), rtol=0, atol=1e-5)


def test_a_batch_beyond_the_context_is_refused() -> None:
    with pytest.raises(InputError, match=r"65 tokens do not fit .* context of 64"):
        GPT2(SMALL)(torch.zeros(1, 65, dtype=torch.int64))
