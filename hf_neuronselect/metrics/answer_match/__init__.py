"""Exact match of final answers."""
