"""Evaluation: benchmarks, answers, statistics, reports of runs."""
