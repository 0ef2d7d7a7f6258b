"""How picks are kept apart. Importing this is cheap: the command line's options do."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import NeuronSelectError


@dataclass(frozen=True)
class Spread:
    """How picks are kept apart.

    Attributes:
        source_share: largest share of the picks from one source, in (0, 1]. source_column: where sources are.
        drop_near_copies: whether rows nearly equal to a better one are passed over.

    Raises:
        NeuronSelectError: a share out of range.
    """

    source_share: float | None = None
    source_column: str = "source"
    drop_near_copies: bool = False

    def __post_init__(self) -> None:
        if self.source_share is not None and not 0 < self.source_share <= 1:
            raise NeuronSelectError("must lie in (0, 1]; 0.2: at most a fifth", option="source_share",
                                    value=self.source_share)  # fmt: skip

    def __bool__(self) -> bool:
        """Whether it changes anything."""
        return self.source_share is not None or self.drop_near_copies
