"""Tasks for lm-evaluation-harness whose answers are right or wrong, made from a seed.

`questions` writes the questions, `files` the harness's files, and `scorers`, which is copied beside
them, marks the answers. `figures` turns marks into accuracies, differences and intervals.
"""
