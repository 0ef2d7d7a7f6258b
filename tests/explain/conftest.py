"""A browser for the tests of one page."""

from collections.abc import Iterator
from typing import Any

import pytest
from chromium import launched


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as opened:
        yield opened
