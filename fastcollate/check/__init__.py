"""Prove and show: verify, inspect, report, bench."""
