"""Prepares the data sets of the benchmarks as a folder that scoring reads without network (`--mirror DIR`)."""
