"""`python -m data_prep.benchmarks`, what scripts/prepare_benchmarks.sh runs."""

from data_prep.benchmarks.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
