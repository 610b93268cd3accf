"""Comparisons of methods over seeds and benchmarks: statistics, conclusions and the report."""
