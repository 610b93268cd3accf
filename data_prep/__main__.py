"""`python -m data_prep`, what scripts/prepare_data.sh runs."""

from data_prep.cli import main
from data_prep.program import run

if __name__ == "__main__":
    run(main)
