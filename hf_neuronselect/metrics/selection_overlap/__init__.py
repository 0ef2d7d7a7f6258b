"""Overlap between selections."""
