"""``push_to_hub`` of everything that has ``save_pretrained``."""

from __future__ import annotations

import tempfile
from typing import Any

from .push import push_folder


class PushToHub:
    """Adds ``push_to_hub``: the folder that ``save_pretrained`` writes, in one commit."""

    def save_pretrained(self, folder: str) -> None:
        raise NotImplementedError

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        token: str | bool | None = None,
        allow_public: bool = False,
        **saving: Any,
    ) -> str:
        """Push it with its card, in one commit; a missing repository or branch is created.

        Args:
            private, revision, create_pr, commit_message, token, allow_public: see
                :func:`hf_neuronselect.hub.push.push_folder`.
            saving: options of ``save_pretrained``.

        Returns:
            The repository's URL, or the pull request's.

        Raises:
            NeuronSelectError: the Hub refuses it, or the repository holds something else or must not be public.
        """
        with tempfile.TemporaryDirectory(prefix="neuronselect-") as folder:
            self.save_pretrained(folder, **saving)
            return push_folder(
                folder, repo_id, private=private, revision=revision, create_pr=create_pr,
                commit_message=commit_message or repr(self), token=token, allow_public=allow_public,
            )  # fmt: skip
