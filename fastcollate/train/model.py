"""GPT-2, for padded and for packed batches, with published weights in the Hugging Face naming.

Parameters carry the names of the published files, so that reading one is a matter of sizes and of transposing the
matrices (the published ones are stored input by output).
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcollate.errors import InputError, import_extra
from fastcollate.train.cuda import attention


@dataclass(frozen=True, slots=True, kw_only=True)
class GPT2Config:
    """The shape of a model; `tie_weights` uses the token embedding as output head too, as the published ones do.

    Example:
        >>> from fastcollate.train.model import GPT2Config
        >>> GPT2Config(num_layers=1, num_heads=2, width=16).vocab_size
        50257
    """

    num_layers: int
    num_heads: int
    width: int
    vocab_size: int = 50257
    context_length: int = 1024
    dropout: float = 0.0
    tie_weights: bool = True

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise InputError(f"width {self.width} is not a multiple of the {self.num_heads} heads; choose one that is")


CONFIGS: Mapping[str, GPT2Config] = {
    "tiny": GPT2Config(num_layers=2, num_heads=2, width=64),
    "124M": GPT2Config(num_layers=12, num_heads=12, width=768),
    "355M": GPT2Config(num_layers=24, num_heads=16, width=1024),
    "774M": GPT2Config(num_layers=36, num_heads=20, width=1280),
    "1558M": GPT2Config(num_layers=48, num_heads=25, width=1600),
}


def config_of(model: str, *, dropout: float = 0.0, tie_weights: bool = True) -> GPT2Config:
    """The configuration called `model`."""
    if model not in CONFIGS:
        raise InputError(f"model {model!r}: choose one of {', '.join(CONFIGS)}")
    return replace(CONFIGS[model], dropout=dropout, tie_weights=tie_weights)


class Segments:
    """Where the rows of a batch begin and end, for attention that keeps them apart.

    `cu_seqlens` is int32, cumulative lengths over the flattened batch, starting at 0. No segment is longer than
    `longest`, which may be generous (the pack's capacity): that spares a wait for the device. `cells` is what our
    kernel reads, where it is taken: then `cu_seqlens` is not looked at.
    """

    def __init__(self, cu_seqlens: Tensor | None, longest: int, cells: tuple[Tensor, Tensor] | None = None) -> None:
        self.cu_seqlens = cu_seqlens
        self.longest = longest
        self.cells = cells

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Tokens of each segment; reading it waits for the device once."""
        assert self.cu_seqlens is not None
        found: list[int] = self.cu_seqlens.diff().tolist()
        return found


class KeyValueCache:
    """The keys and values of up to `capacity` tokens, so that generation computes each token once.

    `like` is a tensor on the model's device with the type of its activations.
    """

    def __init__(self, config: GPT2Config, capacity: int, *, like: Tensor) -> None:
        head_size = config.width // config.num_heads
        self.store = like.new_empty(config.num_layers, 2, 1, config.num_heads, capacity, head_size)
        self.length = 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put new keys and values `(1, heads, new, head size)` behind the old ones and return all of them."""
        end = self.length + key.shape[2]
        self.store[layer, 0, :, :, self.length : end] = key
        self.store[layer, 1, :, :, self.length : end] = value
        return self.store[layer, 0, :, :, :end], self.store[layer, 1, :, :, :end]


def _packed_attention(qkv: Tensor, segments: Segments, dropout: float) -> Tensor:
    """Causal attention within each segment, of `(tokens, 3, heads, head size)`: `(tokens, heads, head size)`."""
    if segments.cells is not None:
        return attention.our_kernel(qkv, segments.cells)
    if qkv.is_cuda:
        why = attention.why_segments_one_by_one(qkv.dtype, dropout)
        if why is None:
            assert segments.cu_seqlens is not None
            return attention.varlen(qkv, segments.cu_seqlens, segments.longest)
        _warn_once(f"packed attention runs segment by segment, which is slow on a GPU: {why}")
    # Exact everywhere, and on a CPU faster than one masked or padded call, which computes what it then throws away.
    # `split`, not slices: the gradient of a slice is as large as the whole.
    parts = []
    for part in torch.split(qkv, segments.lengths):
        query, key, value = part.unsqueeze(0).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout)
        parts.append(mixed[0].transpose(0, 1))
    return torch.cat(parts)


_warn_once = functools.cache(warnings.warn)


class Attention(nn.Module):
    """Causal self-attention; `layer` is its place in a cache."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.width, 3 * config.width)
        self.c_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, segments: Segments | None, cache: KeyValueCache | None) -> Tensor:
        """Mix each cell of `x` `(batch, length, width)` with those before it."""
        batch, length, width = x.shape
        qkv = self.c_attn(x).view(batch, length, 3, self.num_heads, width // self.num_heads)
        dropout = self.dropout if self.training else 0.0
        if segments is not None:
            mixed = _packed_attention(qkv.flatten(0, 1), segments, dropout)
        else:
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
            is_causal = True
            if cache is not None:
                is_causal = length > 1  # a single new token sees all before it; a prompt comes first and whole
                key, value = cache.extend(self.layer, key, value)
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal, dropout_p=dropout)
            mixed = mixed.transpose(1, 2)
        projected: Tensor = self.c_proj(mixed.reshape(batch, length, width))
        return projected


class MLP(nn.Module):
    """The feed-forward half of a block."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.width, 4 * config.width)
        self.c_proj = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Each cell of `x` by itself."""
        projected: Tensor = self.c_proj(functional.gelu(self.c_fc(x), approximate="tanh"))
        return projected


class Block(nn.Module):
    """Attention and feed-forward, each behind a layer norm and beside a residual."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, segments: Segments | None, cache: KeyValueCache | None) -> Tensor:
        """`x` and what the two halves add to it."""
        x = x + self.drop(self.attn(self.ln_1(x), segments, cache))
        added: Tensor = self.drop(self.mlp(self.ln_2(x)))
        return x + added


class GPT2(nn.Module):
    """GPT-2 (Radford et al., 2019). `forward` gives logits, `hidden` what the output head reads.

    Args:
        config: the shape.

    Example:
        >>> import torch
        >>> from fastcollate.train.model import GPT2, GPT2Config
        >>> model = GPT2(GPT2Config(num_layers=1, num_heads=2, width=16))
        >>> model(torch.tensor([[5, 6, 7]])).shape  # logits of the next token
        torch.Size([1, 3, 50257])
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.width)
        self.wpe = nn.Embedding(config.context_length, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.width)
        self.lm_head = None if config.tie_weights else nn.Linear(config.width, config.vocab_size, bias=False)
        self._initialize()

    @classmethod
    def of(cls, model: str) -> GPT2:
        """The model called `model`, as it is before training; see `config_of`."""
        return cls(config_of(model))

    def _initialize(self) -> None:
        residual = 0.02 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif ".ln_" not in name and not name.startswith("ln_"):
                nn.init.normal_(parameter, std=residual if name.endswith("c_proj.weight") else 0.02)

    @property
    def head_weight(self) -> Tensor:
        """The output head, `(vocabulary, width)`: the token embedding itself where weights are tied."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def hidden(
        self,
        inputs: Tensor,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """The last layer's normalized output, `(batch, length, width)`.

        Args:
            inputs: token ids, int64 `(batch, length)`, right-padded or packed.
            position_ids: int64 of the same shape; `None` counts from 0 (from the cache's length with a cache).
            cu_seqlens: int32 segment boundaries over the flattened batch, for a packed batch: attention stays
                within a segment.
            cache: for generation, batch 1 without `cu_seqlens`: the new tokens follow those in the cache.

        Raises:
            InputError: the batch is longer than the model's context.
        """
        start = cache.length if cache is not None else 0
        length = inputs.shape[1]
        if position_ids is None:
            if start + length > self.config.context_length:
                raise InputError(
                    f"{start + length} tokens do not fit the model's context of {self.config.context_length}; "
                    f"set a length limit (--max-length {self.config.context_length})"
                )
            position_ids = torch.arange(start, start + length, device=inputs.device)
        x = self.drop(self.wte(inputs) + self.wpe(position_ids))
        if torch.is_autocast_enabled(x.device.type):  # what the layers add to is as narrow as what they add
            x = x.to(torch.get_autocast_dtype(x.device.type))
        segments = self._segments(x, cu_seqlens) if cache is None else None
        with attention.steady_attention(x.device.type):
            for block in self.h:
                x = block(x, segments, cache)
        if cache is not None:
            cache.length += length
        normalized: Tensor = self.ln_f(x)
        return normalized

    def _segments(self, x: Tensor, cu_seqlens: Tensor | None) -> Segments | None:
        dropout = self.config.dropout if self.training else 0.0
        cells = attention.cells_for_our_kernel(cu_seqlens, x, self.config.width // self.config.num_heads, dropout)
        if cells is None and cu_seqlens is None:
            return None
        return Segments(cu_seqlens, min(x.shape[1], self.config.context_length), cells)

    def forward(self, inputs: Tensor, position_ids: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Logits `(batch, length, vocabulary)`; arguments as in `hidden`."""
        return functional.linear(self.hidden(inputs, position_ids, cu_seqlens), self.head_weight)


def load_published(path: Path, config: GPT2Config) -> GPT2:
    """A model with the weights of a local file in the Hugging Face naming, which must be of the same shape.

    The file is `*.safetensors`, or PyTorch's (`pytorch_model.bin`), of which tensors alone are read, and no code.
    """
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in _read_tensors(path).items()}
    model = GPT2(config)
    if model.lm_head is not None and "lm_head.weight" not in tensors and "wte.weight" in tensors:
        tensors["lm_head.weight"] = tensors["wte.weight"]  # the published files are tied
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in tensors:
                raise InputError(f"{path}: no tensor {name!r}; is this a GPT-2 in the Hugging Face naming?")
            tensor = tensors[name]
            if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                tensor = tensor.T  # stored input by output
            if tensor.shape != parameter.shape:
                raise InputError(
                    f"{path}: {name!r} is {tuple(tensor.shape)}, the model needs {tuple(parameter.shape)}"
                    f"{_remedy(tensors)}"
                )
            parameter.copy_(tensor)
    layers = {int(name.split(".")[1]) for name in tensors if name.startswith("h.")}
    if len(layers) != config.num_layers:
        raise InputError(f"{path}: {len(layers)} layers, the model has {config.num_layers}{_remedy(tensors)}")
    return model


def _remedy(tensors: Mapping[str, Tensor]) -> str:
    width = tensors["wte.weight"].shape[-1]
    layers = len({name.split(".")[1] for name in tensors if name.startswith("h.")})
    fitting = [f": --model {n}" for n, c in CONFIGS.items() if (c.width, c.num_layers) == (width, layers)]
    return f"; the file holds a model of width {width} with {layers} layers{''.join(fitting)}"


def _read_tensors(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a local model.safetensors or pytorch_model.bin")
    if path.suffix == ".safetensors":
        safetensors = import_extra("safetensors.torch", "hf")
        try:
            loaded: Mapping[str, Tensor] = safetensors.load_file(path)
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            raise InputError(f"{path}: not a safetensors file ({error}); download it again") from error
        return loaded
    found = read_torch_file(path)
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"{path}: holds something else than named tensors; give a state dictionary")
    return found


def read_torch_file(path: Path) -> Any:
    """What `torch.save` wrote, onto the CPU: tensors and plain values only, no code is run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # arbitrary bytes make the unpickler raise errors of any type
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: damaged, or not a PyTorch file of tensors alone ({first_line})") from error
