"""Versions of the installed libraries, for the few tests whose outcome depends on them."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version


def before(package: str, limit: str) -> bool:
    """Whether an older version than this one is installed."""
    return Version(version(package)) < Version(limit)
