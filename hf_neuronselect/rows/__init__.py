"""Rows of any instruction format: loading, reading, tokenising, duplicates and leakage."""
