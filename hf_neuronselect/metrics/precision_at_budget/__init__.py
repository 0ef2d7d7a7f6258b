"""Precision of a pool's best-scored rows."""
