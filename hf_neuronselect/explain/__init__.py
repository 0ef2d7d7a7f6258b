"""Explanations, reports and pictures."""
