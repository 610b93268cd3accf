"""Fetches, unpacks and checks the data that the recipes train on. Start: bash scripts/prepare_data.sh --help."""
