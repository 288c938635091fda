"""Pairs of answers, and answers with verdicts -> rows."""
