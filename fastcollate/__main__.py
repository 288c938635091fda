"""`python -m fastcollate` is the command line."""

from fastcollate.cli import main

if __name__ == "__main__":
    main()
