"""Benchmarks, scorers, statistics and reports. Nothing here but the runner imports torch."""
