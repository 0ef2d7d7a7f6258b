"""Whole jobs as functions on typed options; the command line and recipes call them."""
