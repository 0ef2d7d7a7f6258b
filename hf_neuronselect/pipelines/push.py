"""Push a folder to the Hub."""

from __future__ import annotations

from pathlib import Path

from ..core.configs import CommitOptions, PushConfig
from ..hub.push import push_folder
from ..selection.selection import Selection


def push(config: PushConfig) -> str:
    """Push ``config.folder``, in one commit.

    Returns:
        The repository's URL, or the pull request's.
    """
    if not config.examples:
        Selection.from_pretrained(config.folder).write_pages(config.folder, examples=False)
    return commit(config.folder, config.repo, config)


def commit(folder: Path, repo: str, options: CommitOptions) -> str:
    """Push a folder as it is."""
    return push_folder(
        folder,
        repo,
        private=options.private,
        revision=options.revision,
        create_pr=options.create_pr,
        commit_message=options.commit_message,
        allow_public=options.allow_public,
    )
