"""A Lightning run in a process of its own (two with gloo): prints nothing, writes each rank's losses and rows as JSON.

Usage: lightning_run.py STORE OUT NUM_PROCESSES STOP_AFTER(0: never) CHECKPOINT(- for none)
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from fastcollate.integrations.lightning import DataModule

warnings.filterwarnings("ignore")


class TinyModel(pl.LightningModule):
    def __init__(self, vocab_size: int = 100) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(vocab_size, 16)
        self.head = torch.nn.Linear(16, vocab_size)
        self.seen: list[tuple[int, float, int]] = []
        self.validated: list[int] = []

    def _loss(self, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        return torch.nn.functional.cross_entropy(self.head(self.embedding(inputs)).flatten(0, 1), targets.flatten())

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self._loss(batch)
        self.seen.append((self.current_epoch, float(loss), int(batch.inputs.sum())))
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.validated.append(len(batch.inputs))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.5)


class StopAfter(pl.Callback):
    """Saves Lightning's own checkpoint after a step, and stops there."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def main(store: str, out: str, num_processes: int, stop_after: int, checkpoint: str | None) -> None:
    directory = Path(out)
    model = TinyModel()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=num_processes,
        strategy="ddp" if num_processes > 1 else "auto",
        max_epochs=3,
        min_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[StopAfter(stop_after, directory / "stopped.ckpt")] if stop_after else [],
    )
    data = DataModule(store, split={"train": 0.9, "val": 0.1}, batch_size=4, window=16, seed=2, mask_prompt=True)
    trainer.fit(model, datamodule=data, ckpt_path=checkpoint)
    result = {"seen": model.seen, "validated": model.validated}
    (directory / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), None if sys.argv[5] == "-" else sys.argv[5])
