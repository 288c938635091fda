"""The reference's log-probabilities of all answers of a store: computed once, and kept in a file beside the store."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcollate.errors import InputError
from fastcollate.load import BatchLoader
from fastcollate.plan import MixedStore
from fastcollate.progress import progress_bar
from fastcollate.store import TokenStore, files, require_served
from fastcollate.store import manifest as manifests
from fastcollate.train.files import load_model
from fastcollate.train.model import GPT2
from fastcollate.train.options import TrainOptions
from fastcollate.train.preference.dpo import Judged, answer_log_probs
from fastcollate.train.ranks import Ranks

_VERSION = 1
_CELLS = 1 << 14  # of a batch


class Reference:
    """The log-probabilities of a store's pairs, float64 `(2, num_pairs)`: of the chosen and of the rejected answers.

    `model` is the digest of the model that gave them.
    """

    def __init__(self, values: Tensor, model: str = "") -> None:
        self.values, self.model = values, model

    @property
    def num_alike(self) -> int:
        """Pairs whose answers are the same, as far as they are trained: they teach nothing."""
        return int((self.values[0] == self.values[1]).sum())

    def judged(self, batch: Any) -> Judged:
        """What the loss needs of a `PreferenceBatch` besides its cells."""
        return Judged(batch.rows, self.values[:, batch.pairs])


def check_objective(source: TokenStore | MixedStore, options: TrainOptions) -> None:
    """Pairs are for dpo, and dpo is for one store of them."""
    if options.objective != "dpo":
        require_served(source)
    elif isinstance(source, MixedStore) or source.kind != "pairs":
        raise InputError(
            f"{source.path}: --objective dpo needs one store of pairs, with its reference beside it; make it with: "
            "fastcollate prepare --template preference (of several sources together, in place of --mix)"
        )


def reference_for(
    store: TokenStore, options: TrainOptions, ranks: Ranks, context: int, say: Callable[[str], object]
) -> Reference | None:
    """What the pairs are to a run's reference, which the first rank computes where nobody has before."""
    found, checkpoint = None, options.reference_checkpoint
    for turn in (True, False):
        if checkpoint is None:
            return None
        if ranks.is_first == turn:
            found = reference_of(
                store, checkpoint, max_length=options.max_length or context,
                precision=options.precision, device=ranks.device, out=options.out, say=say,
            )  # fmt: skip
        ranks.barrier()
    if found is not None and ranks.is_first and found.num_alike:
        say(
            f"note: {found.num_alike:,} of {len(store) // 2:,} pairs have the same answers within their first "
            f"{options.max_length or context:,} tokens, prompts included, and teach nothing; raise --max-length"
        )
    return found


def reference_of(
    store: TokenStore,
    checkpoint: Path,
    *,
    max_length: int | None,
    precision: str,
    device: torch.device,
    out: Path,
    say: Callable[[str], object],
    progress: bool = False,
) -> Reference:
    """What the model of a checkpoint makes of the pairs of a store, from the file beside it where it is there.

    The file's name and content tell the store's content, the checkpoint's, and what else decides the numbers: those of
    another store or checkpoint are never taken for them.

    Raises:
        InputError: the checkpoint cannot be read, or knows fewer tokens than the store.
    """
    model, _ = load_model(checkpoint)
    if store.vocab_size > model.config.vocab_size:
        raise InputError(
            f"{checkpoint}: the reference knows {model.config.vocab_size} tokens, the store's ids go up to "
            f"{store.vocab_size - 1}; prepare the pairs with its tokenizer"
        )
    digest = _digest(model)
    what = [_VERSION, store.fingerprint, digest, max_length, precision]
    fingerprint = hashlib.sha256(manifests.canonical(what)).hexdigest()
    # Beside a store in object storage nothing is written: then it is the run's.
    beside = store.path if isinstance(store.path, Path) else out / "store"
    path = beside.parent / f"{beside.name}.reference-{fingerprint[:16]}.npz"
    found = _read(path, fingerprint, len(store) // 2) if path.exists() else None
    if found is None:
        if path.exists():
            say(f"{path}: damaged, or of something else; computed anew")
        found = _compute(store, model.to(device), max_length, precision, device, progress=progress)
        try:
            buffer = io.BytesIO()
            np.savez(buffer, fingerprint=fingerprint, log_probs=found)
            files.write_file(path, buffer.getvalue())
            say(f"reference: log-probabilities of {len(store) // 2:,} pairs, kept in {path}")
        except OSError as error:  # the folder may be read-only
            say(f"{path}: cannot be written ({error.strerror or error}); the next run computes this again")
    return Reference(torch.from_numpy(found).to(device), digest)


def _digest(model: GPT2) -> str:
    """The content of the model alone: the checkpoint of a run that went on has another."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path, fingerprint: str, num_pairs: int) -> Any:
    """The log-probabilities in a file; `None` where it is damaged, or of something else."""
    try:
        with np.load(path, allow_pickle=False) as content:
            found = content["log_probs"]
            is_whole = found.shape == (2, num_pairs) and found.dtype == np.float64 and np.isfinite(found).all()
            return found if is_whole and str(content["fingerprint"]) == fingerprint else None
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):
        return None


@torch.no_grad()
def _compute(
    store: TokenStore, model: GPT2, max_length: int | None, precision: str, device: torch.device, *, progress: bool
) -> Any:
    model.eval()
    found = torch.full((2, len(store) // 2), torch.nan, dtype=torch.float64)
    loader = BatchLoader(
        store, max_tokens=max(_CELLS, 2 * store.max_length), max_length=max_length, device=device,
        rank=0, world_size=1,  # all pairs, whoever trains together
    )  # fmt: skip
    is_narrow = precision == "bfloat16"
    with progress_bar(unit="pairs", progress=progress) as bar:
        task = bar.add_task("reference", total=len(store) // 2)
        for batch in loader:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_narrow):
                hidden = model.hidden(batch.inputs)
                values = answer_log_probs(hidden, model.head_weight, batch.targets, batch.rows, None)  # type: ignore[union-attr]
            chosen, rejected = batch.targets.chunk(2)
            values[1] = torch.where((chosen == rejected).all(1), values[0], values[1])  # to the last bit
            found[:, batch.pairs.cpu()] = values.cpu()  # type: ignore[union-attr]
            bar.update(task, advance=values.shape[1])
    assert not bool(found.isnan().any())
    return found.numpy()
