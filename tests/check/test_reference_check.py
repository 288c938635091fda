"""`verify`: it agrees on a whole store, and each kind of damage is found."""

from __future__ import annotations

import json
import os
import re
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastcollate.check import reference_check as room
from fastcollate.check.reference_check import expected_batch, verify
from fastcollate.collate.batch import Batch, PackedBatch
from fastcollate.collate.collator import Collator
from fastcollate.errors import InputError
from fastcollate.ingest.job import prepare
from fastcollate.load.loader import BatchLoader
from fastcollate.store.store import TokenStore
from fastcollate.train import MaskOptions, OrderOptions
from tests.fuzz_verify import run
from tests.helpers import APPEND, Row, run_cli, write_store

PAD = 50256
RECORDS = [{"instruction": f"Count to {n}.", "input": "x" * (n % 3), "output": "1 2 3 " * n} for n in range(1, 24)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify") / "records.json"
    path.write_text(json.dumps(RECORDS))
    return path


@pytest.fixture(scope="module")
def prepared(source: Path) -> TokenStore:
    prepare(str(source), str(source.parent / "store"), workers=1)
    return TokenStore(source.parent / "store")


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["sequential", "shuffled", "bucketed"])
def test_a_whole_store_agrees(prepared: TokenStore, source: Path, policy: str) -> None:
    masks = MaskOptions(mask_prompt=policy != "sequential")
    found = verify(prepared, masks, OrderOptions(policy=policy), sources=[str(source)], checksums=True, progress=False)
    assert found.ok, found.problems
    assert (found.batches, found.rows, found.records, found.files) == (3, 23, 23, found.files)
    assert found.files is not None
    assert found.files >= 2
    assert found.cells > 2 * prepared.num_tokens


@pytest.mark.parametrize(("masked", "mode"), [(True, "reference"), (False, "positional")])
def test_packs_agree(prepared: TokenStore, masked: bool, mode: str) -> None:
    for options, capacity in (({}, 120), ({"max_length": 40}, 100), ({}, None)):
        found = verify(
            prepared,
            MaskOptions(mask_prompt=masked, mode=mode, **options),
            OrderOptions(policy="packed", batch_size=2, capacity=capacity),
            progress=False,
        )
        assert found.ok, found.problems
        assert found.rows >= 23


def nth_inputs(store: TokenStore, number: int, **options: Any) -> torch.Tensor:
    """The inputs by which a batch is known, whichever thread fills it."""
    return next(islice(BatchLoader(store, **options), number, None)).inputs.clone()


def test_one_wrong_cell_of_a_pack_is_found(prepared: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = int(prepared.lengths.max())
    wanted = nth_inputs(prepared, 1, policy="packed", batch_size=2, capacity=longest)
    original = Collator.packed_batches

    def broken(self: Collator, *args: Any) -> list[PackedBatch]:
        batches = list(original(self, *args))
        for batch in batches:
            if torch.equal(batch.inputs, wanted):
                batch.position_ids[0, 3] += 1
                batch.cu_seqlens[1] += 1
        return batches

    monkeypatch.setattr(Collator, "packed_batches", broken)
    found = verify(prepared, order=OrderOptions(policy="packed", batch_size=2, capacity=longest), progress=False)
    assert found.num_problems == 2
    assert found.problems[0].startswith("batch 1, position_ids: pack 0 column 3 is ")
    assert found.problems[1].startswith("batch 1, cu_seqlens: column 1 is ")


def test_the_digest_depends_on_the_batches_only(prepared: TokenStore) -> None:
    digests = [verify(prepared, order=OrderOptions(seed=seed), progress=False).digest for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]
    other = verify(prepared, MaskOptions(mask_prompt=True), OrderOptions(seed=1), progress=False).digest
    assert other != digests[0]


@pytest.mark.parametrize("tensor", [0, 1])
def test_one_wrong_cell_is_found(prepared: TokenStore, monkeypatch: pytest.MonkeyPatch, tensor: int) -> None:
    wanted = nth_inputs(prepared, 1, policy="sequential", batch_size=8)
    original = Collator.batches

    def broken(self: Collator, *args: Any) -> list[Batch]:
        batches = list(original(self, *args))
        for batch in batches:
            if torch.equal(batch.inputs, wanted):
                batch[tensor][2, 3] += 1
        return batches

    monkeypatch.setattr(Collator, "batches", broken)
    found = verify(prepared, order=OrderOptions(policy="sequential"), progress=False)
    assert found.num_problems == 1
    assert found.problems[0].startswith(f"batch 1, {('inputs', 'targets')[tensor]}: row 10 column 3 is ")


def test_a_wrong_width_is_found(prepared: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Collator.batches

    def cut(self: Collator, *args: Any) -> list[Batch]:
        return [Batch(*(cells[:, 1:] for cells in batch)) for batch in original(self, *args)]

    monkeypatch.setattr(Collator, "batches", cut)
    found = verify(prepared, progress=False)
    assert found.num_problems == 6
    assert "but the reference gives" in found.problems[0]


def test_a_row_that_no_batch_holds_is_found(prepared: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    class Short:
        def __init__(self, store: TokenStore, **_: Any) -> None:
            self.store = store

        def set_epoch(self, epoch: int) -> None:
            pass

        def __iter__(self) -> Any:
            collator = MaskOptions().collator(self.store)
            return (collator(np.arange(8)) for _ in range(2))

    plan = [np.arange(8), np.arange(8)]
    monkeypatch.setattr(room, "BatchLoader", Short)
    monkeypatch.setattr(room, "plan_of_store", lambda *_, **__: plan)
    found = verify(prepared, progress=False)
    assert found.num_problems == 15
    assert found.problems[0] == "row 8 is in no batch of the epoch"


def test_a_changed_source_is_found(prepared: TokenStore, tmp_path: Path) -> None:
    changed = [dict(record) for record in RECORDS]
    changed[4]["output"] += "!"
    changed[7]["instruction"] = "Count up."
    del changed[20:]
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(changed))
    found = verify(prepared, sources=[str(path)], progress=False)
    assert [problem.split(":")[0] for problem in found.problems] == ["row 4", "row 7", "row 20"]
    assert "there is no record 20" in found.problems[-1]


def test_a_moved_boundary_is_found(prepared: TokenStore, source: Path, tmp_path: Path) -> None:
    rows: list[Row] = [(row.spans.tolist(), row.input_ids.tolist()) for row in prepared]
    spans, ids = rows[3]
    rows[3] = ([spans[0] + 1, spans[1] - 1], ids)
    store = write_store(tmp_path / "moved", rows, tokenizer=prepared.manifest["tokenizer"])
    store.manifest.update(template=prepared.manifest["template"], options=prepared.manifest["options"])
    found = room.Verification()
    tokenizer, _ = room.tokenizer_of(store)
    assert tokenizer is not None
    parts = room.load_template("alpaca").parts(RECORDS[3])
    room._compare_row(store, 3, parts, tokenizer, True, found)
    assert found.problems == [f"row 3: a prompt of {spans[0] + 1} tokens, but tiktoken gives {spans[0]}"]
    room._compare_row(store, 4, room.load_template("alpaca").parts(RECORDS[4]), tokenizer, True, found)
    assert found.num_problems == 1
    store.manifest["options"] = {"boundary": "exact"}
    room._compare_row(store, 3, parts, tokenizer, True, found)
    assert found.problems[1:] == [f"row 3: token {spans[0]} counts as prompt, which it is not"]


@pytest.mark.parametrize("boundary", ["reference", "exact"])
@pytest.mark.parametrize(
    "template",
    [
        "{{ instruction }} -> {% generation %}{{ output }}{% endgeneration %}",  # the blank goes with the response
        "{{ instruction }}{% generation %}{{ output }}{% endgeneration %}.",
        "{% generation %}{{ output }}{% endgeneration %}{{ instruction }}",
    ],
)
def test_a_response_that_merges_with_its_heading_is_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, boundary: str, template: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.jinja").write_text(template)
    lines = [json.dumps({"instruction": "Say it", "output": out}) for out in (" yes", "yes", "\nno", "日本", " ")]
    Path("a.jsonl").write_text("\n".join(lines))
    prepare("a.jsonl", "s", template="own.jinja", boundary=boundary)
    found = verify(TokenStore("s"), sources=["a.jsonl"], progress=False)
    assert (found.problems, found.records) == ([], 5)


@pytest.mark.slow
def test_any_store_that_was_just_prepared_is_right() -> None:
    counts = run(int(os.environ.get("FUZZ_JOBS", "104")), int(os.environ.get("FUZZ_SEED", "1")))
    assert counts["changed sources noticed"] > counts["jobs"] // 4
    assert counts["rows"] > counts["jobs"]


def test_sources_need_the_vocabulary_of_the_store(tmp_path: Path, source: Path) -> None:
    with pytest.raises(InputError, match="its ids cannot be checked"):
        verify(write_store(tmp_path / "s", [([1, 1], [1, 2])]), sources=[str(source)], progress=False)


@pytest.mark.parametrize("missing", ["no-such.json", "no-such-*.jsonl", "nowhere/records.json"])
def test_missing_sources_are_said_before_anything_is_compared(
    prepared: TokenStore, source: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_compare_batches", lambda *_, **__: pytest.fail("an epoch was compared first"))
    for sources in ([missing], [str(source), missing]):
        with pytest.raises(InputError, match=re.escape(missing)):
            verify(prepared, sources=sources, progress=False)


def test_only_the_first_problems_are_kept() -> None:
    found = room.Verification()
    for number in range(50):
        found.note(str(number))
    assert (found.num_problems, len(found.problems), found.ok) == (50, 20, False)


ids = st.lists(st.integers(0, 4).map(lambda t: PAD if t == 4 else t), max_size=9)


@st.composite
def turns(draw: st.DrawFn) -> Row:
    row = draw(ids)
    cuts = sorted(draw(st.lists(st.integers(0, len(row)), max_size=4)))
    return np.diff([0, *cuts, len(row)]).tolist(), row


@pytest.mark.slow
@given(
    rows=st.lists(turns(), min_size=1, max_size=6),
    limit=st.none() | st.integers(1, 10),
    mask=st.booleans(),
    mode=st.sampled_from(["reference", "positional"]),
)
def test_random_stores_agree(rows: list[Row], limit: int | None, mask: bool, mode: str) -> None:
    with TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "s", rows)
        found = verify(store, MaskOptions(limit, mask, mode), OrderOptions(batch_size=2), progress=False)
        assert found.ok, found.problems


def test_the_expectation_for_several_turns() -> None:
    from fastcollate.store.store import Example

    example = Example(np.array([1, 2, 3, 4, 5], np.uint16), np.array([2, 1, 2], np.uint32), 0)
    _, targets = expected_batch([example], APPEND, MaskOptions(mode="positional", mask_prompt=True))
    assert targets.tolist() == [[-100, 3, -100, -100, -100]]
    inputs, targets = expected_batch([example], APPEND, MaskOptions(max_length=2, mask_prompt=False))
    assert inputs.tolist() == [[1, 2]]
    assert targets.tolist() == [[2, 3]]
    assert targets.dtype == torch.int64


def test_the_command(
    prepared: TokenStore, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, "verify", prepared.path, "--source", source, "--checksums", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["ok"], printed["batches"], printed["records"]) == (True, 3, 23)
    assert run_cli(monkeypatch, "verify", prepared.path) == 0
    assert "all identical" in capsys.readouterr().out


def test_the_command_fails_on_damage(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(str(source), str(tmp_path / "s"), workers=1)
    shard = next((tmp_path / "s").glob("shard-*.arrow"))
    raw = bytearray(shard.read_bytes())
    store = TokenStore(tmp_path / "s")
    place = raw.index(store[2].input_ids.tobytes())
    del store
    raw[place] ^= 1
    shard.write_bytes(raw)
    assert run_cli(monkeypatch, "verify", tmp_path / "s", "--checksums") == 1
    printed = capsys.readouterr()
    assert "NOT identical" in printed.out
    assert "SHA-256" in printed.err
    assert run_cli(monkeypatch, "verify", tmp_path / "s", "--source", source, "--json") == 1
    assert json.loads(capsys.readouterr().out)["num_problems"] == 1


@pytest.mark.slow
def test_random_batches_of_the_long_check(monkeypatch: pytest.MonkeyPatch) -> None:
    from million_batches import run_round

    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # it would hold for all tests that follow
    comparisons, cells = run_round(5, 0, 300)
    assert 300 < comparisons < 600
    assert cells > 10_000


@pytest.mark.slow
def test_a_template_that_lies_elsewhere_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "own.jinja").write_text("{{ q }}{% generation %}{{ a }}{% endgeneration %}")
    (tmp_path / "r.jsonl").write_text('{"q": "one two\\n", "a": "three"}\n')
    monkeypatch.chdir(tmp_path)
    prepare("r.jsonl", "s", template="t/own.jinja")
    with pytest.raises(InputError, match=r"own\.jinja.*not in this folder.*run verify where the template lies"):
        verify(TokenStore("s"), sources=["r.jsonl"], progress=False)
