"""`prepare` against `verify`: what one has just stored, the other finds right, and a changed source it finds wrong.

`python -m tests.fuzz_verify [--jobs N] [--seed N]`, or the budget by `FUZZ_JOBS`; two processes; writes
`bench_results/fuzz.json`. A job has a few records, good and bad, in one or two files, by any template, tokenizer,
boundary and policy; it is verified with any order and mask.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.harness import save_part
from fastcollate.check.reference_check import Verification, verify
from fastcollate.errors import InputError
from fastcollate.ingest.job import prepare
from fastcollate.store.store import TokenStore
from fastcollate.train.options import MaskOptions, OrderOptions
from tests.fuzz_chats import ENCODINGS, JINJA, KINDS, SINGLE, Maker, as_written, make_tokenizer

OWN = {
    **JINJA,
    "single": "{{ instruction }} -> {% generation %}{{ output }}{% endgeneration %}",
    "close": "{{ instruction }}{% generation %}{{ output }}{% endgeneration %}",
    "last prompt": "{{ instruction }}{% generation %}{{ output }}{% endgeneration %}{{ input }}",
    "answer first": "{% generation %}{{ output }}{% endgeneration %}{{ instruction }}",
    "twice": "{{ instruction }}{% generation %}{{ input }}{% endgeneration %}{% generation %}{{ output }}"
    "{% endgeneration %}",
}
OF_MESSAGES = ("chat", *JINJA)
TEMPLATES = (*SINGLE, "chat", *OWN)
SPECIAL = ["<|endoftext|>", "<unk>", "<|im_start|>"]


def make_records(maker: Maker, template: str, *, with_special: bool) -> list[dict[str, Any]]:
    """Records as they lie in a file; some are bad."""
    dice, found = maker.dice, []
    for _ in range(dice.randrange(1, 9)):
        record = maker.record("chat" if template in OF_MESSAGES else "alpaca")
        if with_special and dice.random() < 0.3:
            place = record if template not in OF_MESSAGES else dice.choice(record["messages"])
            key = "content" if place is not record else dice.choice(["instruction", "output"])
            place[key] += dice.choice(SPECIAL)
        if dice.random() < 0.05:
            record = dice.choice([{}, {"instruction": None}, {"messages": []}, {"output": 5}])
        found.append(as_written(record, template, dice) if "messages" in record else record)
    return found


def write(path: Path, records: list[dict[str, Any]], dice: random.Random) -> str:
    """A file of records: JSON Lines, or an array."""
    if dice.random() < 0.7:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" * dice.choice([1, 1, 2]) for record in records)
    else:
        path, text = path.with_suffix(".json"), json.dumps(records)
    path.write_text(text, encoding="utf-8")
    return str(path)


def check_job(folder: Path, tokenizer: str, template: str, seed: int) -> Counter[str]:
    """One job, verified.

    Raises:
        AssertionError: a false alarm, or none where there should be one; shows the job.
    """
    maker = Maker(seed)
    dice, name = maker.dice, template
    if template in OWN:
        name = "own.jinja"
        Path(name).write_text(OWN[template])
    options = {
        "template": name, "tokenizer": tokenizer, "boundary": dice.choice(["reference", "exact"]),
        "max_length": dice.choice([None, 3, 8, 20, 40]), "long_prompt": dice.choice(["reject", "keep", "cut", "cut"]),
        "special_text": dice.choice(["reject", "encode"]),
    }  # fmt: skip
    parts = [make_records(maker, template, with_special=True) for _ in range(dice.choice([1, 1, 2]))]
    sources = [write(folder / f"{number}.jsonl", part, dice) for number, part in enumerate(parts)]
    shown = (seed, options, parts)
    counts = Counter(jobs=1)
    try:
        prepare(sources, folder / "store", on_error="skip", workers=1, **options)  # type: ignore[arg-type]
    except InputError as error:
        if "no usable record" not in str(error) and "train nothing" not in str(error):
            raise AssertionError(shown) from error
        return counts + Counter({"jobs without a row": 1})
    store = TokenStore(folder / "store")
    found = run_verify(store, sources, dice)
    assert found.ok, (shown, found.problems)
    assert found.records == len(store), shown
    counts += Counter(records=sum(map(len, parts)), rows=len(store), tokens=store.num_tokens, cells=found.cells)
    changed = parts[0][int(store[0].source_row)] if int(store[0].source_row) < len(parts[0]) else None
    if changed is not None and "output" in changed and "output" in OWN.get(template, "output"):
        changed["output"] += "x!"
        other = write(folder / "changed.jsonl", parts[0], dice)
        assert not run_verify(store, [other, *sources[1:]], dice).ok, shown
        counts["changed sources noticed"] += 1
    return counts


def run_verify(store: TokenStore, sources: list[str], dice: random.Random) -> Verification:
    """Verify a store with any mask and order."""
    masks = MaskOptions(dice.choice([None, 1, 7, 30]), dice.random() < 0.5, dice.choice(["reference", "positional"]))
    policy = dice.choice(["sequential", "shuffled", "bucketed", "packed"])
    order = OrderOptions(policy=policy, batch_size=dice.randrange(1, 5), seed=dice.randrange(9))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rows without a target
        return verify(store, masks, order, sources=sources, checksums=dice.random() < 0.2, progress=False)


def run(num_jobs: int, seed: int) -> Counter[str]:
    """So many jobs, by all tokenizers and templates in turn."""
    counts = Counter[str]()
    with tempfile.TemporaryDirectory() as place, _in(place):
        root = Path(place)
        tokenizers = [*ENCODINGS, *(make_tokenizer(kind, root / f"{kind}.json") for kind in KINDS)]
        for number in range(num_jobs):
            folder = root / str(number)
            folder.mkdir()
            template = TEMPLATES[number // len(tokenizers) % len(TEMPLATES)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # half of the rows train nothing
                counts += check_job(folder, tokenizers[number % len(tokenizers)], template, seed * 1_000_003 + number)
    return counts


@contextlib.contextmanager
def _in(place: str) -> Any:
    before = Path.cwd()
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("FUZZ_JOBS", "10000")))
    parser.add_argument("--seed", type=int, default=29)
    options = parser.parse_args()
    started, counts = time.perf_counter(), Counter[str]()
    with ProcessPoolExecutor(2) as pool:
        shares = [min(250, options.jobs - start) for start in range(0, options.jobs, 250)]
        for found in pool.map(run, shares, range(options.seed * 1000, options.seed * 1000 + len(shares))):
            counts += found
    result = {"seed": options.seed, "differences": 0, **dict(sorted(counts.items()))}
    save_part("fuzz", "verify", {**result, "seconds": round(time.perf_counter() - started, 1)})


if __name__ == "__main__":
    main()
