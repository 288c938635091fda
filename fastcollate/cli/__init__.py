"""The command line: parse, call, print. Each command imports what it needs when it runs, so `--help` is instant."""

from fastcollate.cli import data, model  # their commands, in the order of the help
from fastcollate.cli.app import app, main

__all__ = ["app", "data", "main", "model"]
