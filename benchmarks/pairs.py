"""`python -m benchmarks.pairs`: useful tokens a second of DPO, packed pairs beside TRL's padded ones, one model.

Pairs of gsm8k: the right answer, and its first half without the result. One tiny GPT-2 with the same weights in
`transformers` under TRL's `DPOTrainer`, and in `fastcollate train --objective dpo`, padded and packed; reference
log-probabilities are computed before. First both sides' reference log-probabilities are compared. Then each trains in
turn, and the median of the rounds counts; a useful token is a token of a row, no padding.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch

from benchmarks.harness import save
from fastcollate import TokenStore, prepare
from fastcollate.integrations.preference import preference_dataset
from fastcollate.train import TrainOptions, train
from fastcollate.train.files import Checkpoint, save_checkpoint
from fastcollate.train.model import CONFIGS, load_published
from fastcollate.train.preference.reference import reference_of

STEPS, WARM = 8, 2  # steps of a turn, and those of them that are not counted
PAIRS = 8  # of a padded batch
ASKED = {"beta": 0.1, "learning_rate": 1e-5}


def make_pairs(source: Path, count: int) -> list[dict[str, str]]:
    """Questions with the right answer, and with its first half."""
    found = []
    for line in source.read_text().splitlines()[:count]:
        record = json.loads(line)
        steps = record["answer"].split("\n")
        shortened = "\n".join(steps[: max(1, len(steps) // 2)])
        if shortened != record["answer"]:
            found.append({"prompt": record["question"] + "\n", "chosen": record["answer"], "rejected": shortened})
    return found


def make_model(folder: Path) -> Any:
    """A GPT-2 of transformers, whose weights lie in the folder as published ones and as a run's checkpoint."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    tiny = CONFIGS["tiny"]
    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=tiny.num_layers, n_head=tiny.num_heads, n_embd=tiny.width, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )  # fmt: skip
    torch.save(model.state_dict(), folder / "model.bin")
    ours = load_published(folder / "model.bin", replace(tiny, dropout=0.0))
    save_checkpoint(folder / "checkpoint.pt", Checkpoint(
        step=0, config=ours.config, model=ours.state_dict(), optimizer={}, loader={"epoch": 0}, random=[],
        progress={}, options={}, data={},
    ))  # fmt: skip
    return model


class Trl:
    """TRL's trainer; `speed` trains some steps."""

    def __init__(self, model: Any, store: TokenStore, folder: Path) -> None:
        import trl
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast, TrainerCallback

        class Prepared(trl.DPOTrainer):  # type: ignore[misc]
            def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
                return dataset

        class Clock(TrainerCallback):  # type: ignore[misc]
            def __init__(self) -> None:
                self.times: list[float] = []

            def on_step_end(self, *_: Any, **__: Any) -> None:
                self.times.append(time.perf_counter())

        args = trl.DPOConfig(
            output_dir=str(folder), per_device_train_batch_size=PAIRS, max_steps=STEPS, logging_steps=STEPS,
            save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, bf16=False, max_length=1024,
            precompute_ref_log_probs=True, gradient_checkpointing=False, **ASKED,
        )  # fmt: skip
        words = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"<|endoftext|>": 0}, unk_token="<|endoftext|>")),
            eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        )  # fmt: skip
        self._clock = Clock()
        self.trainer = Prepared(
            model=model,
            args=args,
            train_dataset=preference_dataset(store),
            processing_class=words,
            callbacks=[self._clock],
        )
        collate, self._tokens = self.trainer.data_collator, list[int]()

        def counted(features: Any) -> Any:
            batch = collate(features)
            self._tokens.append(int(batch["attention_mask"].sum()))
            return batch

        self.trainer.data_collator = counted

    @property
    def reference(self) -> np.ndarray[Any, Any]:
        """The log-probabilities that it has computed."""
        rows = self.trainer.train_dataset
        return np.array([rows["ref_chosen_logps"], rows["ref_rejected_logps"]])

    def speed(self) -> float:
        """Useful tokens a second; the end-of-text of a row, which is no input of ours, is not counted."""
        self._clock.times.clear()
        self._tokens.clear()
        self.trainer.train()
        seconds = self._clock.times[STEPS - 1] - self._clock.times[WARM - 1]
        return (sum(self._tokens[WARM:STEPS]) - 2 * PAIRS * (STEPS - WARM)) / seconds


def our_speed(store: TokenStore, folder: Path, out: Path, **options: Any) -> float:
    """The same of `fastcollate train --objective dpo`."""
    asked = TrainOptions(
        out=out, objective="dpo", reference_checkpoint=folder / "checkpoint.pt", max_steps=STEPS, eval_every=0,
        sample_tokens=0, tensorboard=False, train_share=1.0, device="cpu", **ASKED, **options,
    )  # fmt: skip
    train(store, asked, progress=False)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][WARM:]
    return float(sum(line["useful_tokens"] for line in lines) / sum(line["step_s"] for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path, help="gsm8k's train.jsonl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=80)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(make_pairs(asked.source, asked.pairs), folder / "pairs", template="preference")
        store = TokenStore(folder / "pairs")
        with contextlib.redirect_stdout(io.StringIO()):
            theirs = Trl(make_model(folder), store, folder / "trl")
        ours = reference_of(
            store, folder / "checkpoint.pt", max_length=1024, precision="float32", device=torch.device("cpu"),
            out=folder, say=print,
        )  # fmt: skip
        difference = float(np.abs(theirs.reference - ours.values.numpy()).max())
        assert difference < 1e-3, difference
        rounds: list[dict[str, float]] = []
        for number in range(asked.rounds):
            out = folder / f"round-{number}"
            rounds.append(
                {
                    "trl padded": theirs.speed(),
                    "padded": our_speed(store, folder, out / "padded", batch_size=PAIRS),
                    "packed": our_speed(store, folder, out / "packed", policy="packed", batch_size=1),
                }
            )
            print({name: round(speed) for name, speed in rounds[-1].items()}, flush=True)
    medians = {name: round(statistics.median(one[name] for one in rounds), 1) for name in rounds[0]}
    ratios = [one["packed"] / one["trl padded"] for one in rounds]
    result = {
        "what": f"useful tokens a second of DPO on {len(store) // 2} pairs of gsm8k (the right answer, its first "
        f"half), the tiny GPT-2 in float32 on a CPU, reference log-probabilities precomputed; {PAIRS} pairs a padded "
        "batch, a pack of 2,048 cells; TRL's trainer computes its metrics over all logits, as it comes",
        "largest difference of a reference log-probability": difference,
        "useful tokens a second": medians,
        "packed over TRL's padded": round(statistics.median(ratios), 2),
        "ratios of the rounds": [round(ratio, 2) for ratio in ratios],
        "packed over padded": round(statistics.median(one["packed"] / one["padded"] for one in rounds), 2),
    }
    print(save("pairs", result), result)
    assert result["packed over TRL's padded"] >= 1.5


if __name__ == "__main__":
    main()
