"""Build the API pages from the docstrings: `python docs/pages.py [DIRECTORY]` (needs the extra `docs`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "fastcollate"


def main() -> None:
    """Every room gets a page; the adapters' too, where what they adapt to is installed."""
    modules = ["fastcollate"]
    for path in sorted(PACKAGE.rglob("*.py")):
        if not path.stem.startswith("_"):
            modules.append(".".join(["fastcollate", *path.relative_to(PACKAGE).with_suffix("").parts]))
    directory = sys.argv[1] if len(sys.argv) > 1 else "site"
    sys.exit(subprocess.run([sys.executable, "-m", "pdoc", "-d", "google", "-o", directory, *modules]).returncode)


if __name__ == "__main__":
    main()
