"""Evaluation: a model answers the items of tasks through lm-eval, and every item becomes part of a record."""
