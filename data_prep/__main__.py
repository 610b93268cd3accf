"""`python -m data_prep`, what scripts/prepare_data.sh runs."""

from data_prep.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
