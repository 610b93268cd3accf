"""`python -m data_prep.benchmarks`, what scripts/prepare_benchmarks.sh runs."""

from data_prep.benchmarks.cli import main
from data_prep.program import run

if __name__ == "__main__":
    run(main)
