"""The part `peers` of `benchmarks.remote_read`: MosaicML Streaming and litdata read the same rows from object storage.

Theirs run in an environment of their own (see `peer_loaders`), as `PYTHON remote_peers.py KIND PEER FOLDER [...]`,
which imports nothing of fastcollate; each reader is a process of its own with an empty cache.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WORKERS, BATCH = 2, 64
PEERS = {"streaming": "mosaicml-streaming", "litdata": "litdata"}


def batches_of(peer: str, cache: str, limit: int) -> Any:
    """A data loader over an epoch, shuffled; `limit` 0 is none."""
    from peer_loaders import collate, collate_fields
    from torch.utils.data import DataLoader

    if peer == "litdata":
        import litdata

        os.environ["AWS_ALLOW_HTTP"] = "true"  # of the server on this machine
        options = {"max_cache_size": limit} if limit else {}
        data = litdata.StreamingDataset(
            "s3://bucket/litdata", cache_dir=cache, shuffle=True, drop_last=False, **options
        )
        return litdata.StreamingDataLoader(data, batch_size=BATCH, num_workers=WORKERS, collate_fn=collate)
    import streaming

    os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
    streaming.base.util.clean_stale_shared_memory()
    data = streaming.StreamingDataset(
        remote="s3://bucket/streaming", local=cache, shuffle=True, batch_size=BATCH, cache_limit=limit or None
    )
    return DataLoader(data, batch_size=BATCH, num_workers=WORKERS, collate_fn=collate_fields)


def read(peer: str, cache: str, limit: int) -> dict[str, Any]:
    """An epoch, timed from before the data set is made."""
    __import__(peer)
    start = time.perf_counter()
    first, rows, trained = 0.0, 0, 0
    for inputs, targets in batches_of(peer, cache, limit):
        first = first or time.perf_counter() - start
        rows += len(inputs)
        trained += int((targets != -100).sum())
    return {"first_batch_s": first, "seconds": time.perf_counter() - start, "rows": rows, "trained": trained}


def compare(proxy: Any, root: Path, num_shards: int, rows: int) -> None:
    """Write, upload and read each, in turn, without a limit of the cache and with one; saved after each round."""
    import numpy as np

    from benchmarks.harness import save_part
    from benchmarks.remote_stores import make_store, upload, upload_files
    from fastcollate import TokenStore

    size = make_store(root / "ours", num_shards, rows)
    upload(root / "ours", proxy)
    store, limit = TokenStore(root / "ours"), 17 * size // num_shards
    np.save(root / "ids.npy", np.concatenate([shard.input_ids for shard in store.shards]))
    np.save(root / "offsets.npy", np.cumsum([0, *store.lengths]))
    sizes = {"fastcollate": size}
    for peer in PEERS:
        run("write", peer, root, str(size // num_shards))
        sizes[peer] = upload_files(root / peer, proxy)
    what = (
        f"an epoch of the same rows, shuffled, batch {BATCH}, from opening on; 20 ms a request, 200 MB/s; two workers "
        "of a DataLoader each, fastcollate order='shards' and one thread; shards of one size; each run a process of "
        "its own with an empty cache, the limit that of 17 shards"
    )
    found: dict[str, Any] = {}
    for own_limit in (0, limit):
        for name in sizes:
            one = epoch_of(name, proxy, root, own_limit, (len(store), store.num_tokens))
            one["received_over_store"] = round(one.pop("received") / sizes[name], 3)
            found[f"{name}, {'limit' if own_limit else 'no limit'}"] = one
            print(name, own_limit, one, flush=True)
        save_part("remote_read", "peers", {
            "what": what, "rows": len(store), "shards": num_shards, "bytes": sizes, "limit": limit,
            "versions": run("versions", "", root), "found": found,
        })  # fmt: skip


def epoch_of(name: str, proxy: Any, root: Path, limit: int, expected: tuple[int, int]) -> dict[str, Any]:
    """One reader's epoch, of as many rows and trained tokens as there are."""
    from benchmarks.remote_read import fetched, reader

    cache = root / f"cache-{name}-{limit}"
    if name == "fastcollate":
        process = reader("rows", "s3://bucket/ours", cache, str(limit or ""))
    else:
        process = start("read", name, root, str(cache), str(limit))
    one, received = fetched(proxy, process)
    if (one["rows"], one["trained"]) != expected:
        raise SystemExit(f"{name} gave {one}, and there are {expected} rows and tokens")
    rates = {"first_batch_s": round(one["first_batch_s"], 2), "rows_per_s": round(one["rows"] / one["seconds"])}
    return {**rates, "received": received}


def start(*arguments: object) -> subprocess.Popen[str]:
    """The peers' Python with this file."""
    python = os.environ.get("FASTCOLLATE_PEERS", str(Path(__file__).parent.parent / ".peers-venv" / "bin" / "python"))
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
    }
    return subprocess.Popen(
        [python, __file__, *map(str, arguments)], stdout=subprocess.PIPE, text=True, env=environment
    )


def run(*arguments: object) -> Any:
    """What it answers."""
    process = start(*arguments)
    out, _ = process.communicate(timeout=900)
    if process.returncode:
        raise SystemExit(f"{arguments} stopped, as it says above")
    return json.loads(out.splitlines()[-1])


def main() -> None:
    kind, peer, folder, *rest = sys.argv[1:]
    if kind == "versions":
        found: Any = {name: importlib.metadata.version(name) for name in (*PEERS.values(), "torch", "numpy")}
    elif kind == "write":
        import peer_loaders

        peer_loaders.CHUNK_BYTES = int(rest[0])
        {"litdata": peer_loaders.write_litdata, "streaming": peer_loaders.write_streaming}[peer](folder)
        found = "written"
    else:
        found = read(peer, rest[0], int(rest[1]))
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
