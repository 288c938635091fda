"""`python -m fastcollate` is the command line, and so is the command `fastcollate`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C while it is still being loaded ends it in one line too."""
    try:
        from fastcollate.cli import main as run
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
