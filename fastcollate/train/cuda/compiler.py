"""Whether Triton, in which the kernels of this folder are written, compiles for a card of this machine."""

from __future__ import annotations

import functools
import warnings

import torch


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def triton_compiles(device: torch.device) -> bool:
    """Whether it does; a constant to `torch.compile`. Where not, PyTorch's own operations do the work."""
    return _compiles(device)


@functools.cache
def _compiles(device: torch.device) -> bool:
    """Asked once a device: a kernel is compiled and run."""
    try:
        from fastcollate.train.cuda.cross_entropy import to_gradient

        to_gradient(torch.zeros(1, 128, dtype=torch.bfloat16, device=device), torch.tensor([0], device=device), 100)
    except ImportError:
        return False
    except Exception as error:  # it needs a C compiler, and a card that is not too old; each has an error of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"loss and attention take PyTorch's own kernels, which are slower: Triton compiles nothing for {device} "
            f"({reason}); it needs a C compiler (gcc)",
            RuntimeWarning, stacklevel=3,
        )  # fmt: skip
        return False
    return True
