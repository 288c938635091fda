"""`python -m benchmarks`: run every benchmark in turn, each in a process of its own; status 1 if any fails."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

HELPERS = ("__init__", "__main__", "harness", "prepare_data", "tables", "synthetic", "peer_loaders", "plots", "kill")


def main() -> None:
    names = sys.argv[1:] or [
        path.stem for path in sorted(Path(__file__).parent.glob("*.py")) if path.stem not in HELPERS
    ] + ["gpu"]
    failed = []
    for name in names:
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        status = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode
        print(f"== {name}: {'done' if status == 0 else f'status {status}'}, {time.perf_counter() - start:.0f} s")
        failed += [name] if status else []
    for name in ("tables", "plots"):
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
