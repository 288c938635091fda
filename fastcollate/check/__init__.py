"""Prove and show: verify, inspect, report, bench."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastcollate.lazy import face

if TYPE_CHECKING:
    from fastcollate.check.counts import inspect_store as inspect_store
    from fastcollate.check.measure import bench as bench
    from fastcollate.check.measure import print_report as print_report
    from fastcollate.check.page import write_report as write_report
    from fastcollate.check.reference_check import verify as verify
    from fastcollate.check.terminal import print_inspection as print_inspection
    from fastcollate.check.terminal import print_row as print_row
    from fastcollate.check.terminal import view_row as view_row

_MODULE_OF = {
    "bench": "measure", "inspect_store": "counts", "print_inspection": "terminal", "print_report": "measure",
    "print_row": "terminal", "verify": "reference_check", "view_row": "terminal", "write_report": "page",
}  # fmt: skip
__getattr__, __dir__ = face(__name__, _MODULE_OF)
