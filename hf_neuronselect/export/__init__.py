"""Selections as other trainers read them."""
