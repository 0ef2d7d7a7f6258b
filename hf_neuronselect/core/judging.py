"""Options of a judge, a chat model that is asked about rows, and of the command ``judge``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .options import Options, opt

API, HUB, LOCAL = "https://api.openai.com/v1", "hub", "local"


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """Who is asked, and how."""

    judge: str = opt(
        "gpt-4o-mini", "The judge: a name that the API knows, a Hub id, or a folder of a model on this machine."
    )
    at: str | None = opt(
        None,
        "Where it is asked: the base URL of an API like OpenAI's, hub (a provider of the Hub), or local; default local for "
        "a folder, else OpenAI's.",
    )
    key: str | None = opt(
        None, "Environment variable with that URL's key, which is never written down; OPENAI_API_KEY for OpenAI's own."
    )
    concurrency: int = opt(8, "Requests at once.", minimum=1, moves=False)
    tries: int = opt(6, "Tries of a request that times out, or that a busy API refuses.", minimum=1, moves=False)
    timeout: float = opt(60.0, "Seconds that a request may take.", unit="seconds", minimum=0.01, moves=False)
    price_in: float | None = opt(None, "US dollars a million tokens of prompts.", minimum=0, moves=False)
    price_out: float | None = opt(None, "US dollars a million tokens of answers.", minimum=0, moves=False)

    @property
    def place(self) -> str:
        """Where it is asked."""
        path = Path(self.judge).is_dir() or self.judge.startswith(("./", "../", "/", "~"))  # no API has such a name
        return self.at or (LOCAL if path else API)


@dataclass(frozen=True, kw_only=True)
class JudgeConfig(JudgeOptions, Options):
    """Let a chat model rate picks against one exemplar: similarity, format, generalisation, 1 to 10, with reasons."""

    folder: tuple[str, ...] = opt(help="Selections, side by side: folders, or data sets on the Hub.")
    target: str | None = opt(
        None, "Target that the picks are rated for, NAME; NAME=ROWS where its exemplars are not at hand."
    )
    pool: str | None = opt(
        None,
        "The pool, for as many of its rows at random beside the picks; default where it came from, if that is at hand.",
    )
    samples: int = opt(100, "Picks of each selection that are rated, at random.", unit="rows", minimum=2)
    checks: int = opt(
        10, "Pairs of each kind with a known answer, by which the judge itself is checked; 0: none.", minimum=0
    )
    prompt: Path | None = opt(None, "Text file that asks, in the place of ours; with {exemplar} and {row}.")
    seed: int = opt(0, "Seed of what is drawn.", minimum=0)
    out: Path | None = opt(None, "Folder for judged.json and judged.parquet, which has every reason.", moves=False)
