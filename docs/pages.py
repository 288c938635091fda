"""Build the API pages from the docstrings: `python docs/pages.py [DIRECTORY]` (needs the extra `docs`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "fastcollate"
ON_A_CARD = ("attention_kernel", "cross_entropy")  # import Triton, which comes with PyTorch for CUDA only


def main() -> None:
    """Every room gets a page; the adapters' too, where what they adapt to is installed."""
    modules = ["fastcollate"]
    for path in sorted(PACKAGE.rglob("*.py")):
        if not path.stem.startswith("_") and path.stem not in ON_A_CARD:
            modules.append(".".join(["fastcollate", *path.relative_to(PACKAGE).with_suffix("").parts]))
    hidden = [f"!fastcollate.train.cuda.{stem}" for stem in ON_A_CARD]
    directory = sys.argv[1] if len(sys.argv) > 1 else "site"
    sys.exit(
        subprocess.run([sys.executable, "-m", "pdoc", "-d", "google", "-o", directory, *modules, *hidden]).returncode
    )


if __name__ == "__main__":
    main()
