"""Fit targets, score pools, select rows."""
