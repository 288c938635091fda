"""Which rows make which batch: order, packing, mixing, splits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastcollate.lazy import face

if TYPE_CHECKING:
    from fastcollate.plan.mixing import MixedStore as MixedStore
    from fastcollate.plan.options import OrderKeywords as OrderKeywords
    from fastcollate.plan.options import PlanOptions as PlanOptions
    from fastcollate.plan.orders.order import Order as Order
    from fastcollate.plan.packing import pack_lengths as pack_lengths
    from fastcollate.plan.plan import EpochPlan as EpochPlan
    from fastcollate.plan.plan import plan_epoch as plan_epoch
    from fastcollate.plan.splits import split_rows as split_rows

_MODULE_OF = {
    **dict.fromkeys(("OrderKeywords", "PlanOptions"), "options"),
    "MixedStore": "mixing",
    "Order": "orders.order",
    **dict.fromkeys(("pack_lengths",), "packing"),
    **dict.fromkeys(("EpochPlan", "plan_epoch"), "plan"),
    "split_rows": "splits",
}
__getattr__, __dir__ = face(__name__, _MODULE_OF)
