"""Columns computed per row, and the engines that compute them."""
