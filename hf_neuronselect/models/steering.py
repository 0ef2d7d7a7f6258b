"""What a causal LM answers, or how likely it finds an answer, while vectors are added to its activations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..core.errors import NeuronSelectError
from .backbone import Backbone
from .loss import evaluating
from .next_token import memory_name
from .sae import Site

_CHUNK = 1 << 25  # float32 logits in memory at once for the cross entropy: 128 MB


class SteeredModel:
    """A model behind one prompt, with a vector added at a site from the prompt's last token on.

    The prompt is read once; its keys and values are shared by all vectors.

    Args:
        model: a causal LM. prompt: int64 ``[n]``, n >= 1.

    Attributes:
        state: the site's activation at the prompt's last token, as it is: ``[d]``.

    Raises:
        NeuronSelectError: the model has no such site, or keys and values that cannot be repeated.
    """

    def __init__(self, model: Any, site: Site, prompt: np.ndarray) -> None:
        self.model, self.site, self.backbone = model, site, Backbone(model)
        self.module = self.backbone.resolve(site)
        self.device = next(model.parameters()).device
        self.last = torch.from_numpy(prompt[-1:]).to(self.device)
        self._memory: Any = None
        self._in_tuple = False  # whether blocks return tuples; seen when they first run
        with evaluating(model):
            if len(prompt) > 1:
                self._memory = self._run(self.backbone.decoder, prompt[None, :-1], None)[memory_name(model)]
                if not hasattr(self._memory, "batch_repeat_interleave"):
                    raise NeuronSelectError(
                        f"{type(model).__name__} has no keys and values that answers could share; name another model",
                        option="model",
                    )
            self.state = self._seen(prompt[None, -1:])[0, 0]

    def _run(self, module: Any, ids: Any, memory: Any) -> Any:
        ids = torch.as_tensor(ids, device=self.device)
        return module(input_ids=ids, use_cache=True, **({} if memory is None else {memory_name(self.model): memory}))

    def _memories(self, rows: int) -> Any:
        """The prompt's keys and values for so many rows, without its last token's."""
        memory = copy.deepcopy(self._memory)
        if memory is not None:
            memory.batch_repeat_interleave(rows)
        return memory

    def _seen(self, ids: Any) -> torch.Tensor:
        """The site's activation at tokens behind the prompt's memory, nothing added: ``[1, n, d]``."""
        with watched(self.backbone, self.module, self.site) as seen:
            self._run(self.backbone.decoder, ids, self._memories(1))
        self._in_tuple = seen.in_tuple
        return seen.hidden

    # ---------------------------------------------------------------------------------------- losses
    def losses(self, vectors: torch.Tensor, answer: np.ndarray, batch_tokens: int) -> np.ndarray:
        """The loss of one answer under each vector.

        Args:
            vectors: ``[F, d]``. answer: int64 ``[a]``, the tokens that follow the prompt.
            batch_tokens: tokens a batch; changes memory, not the result.

        Returns:
            Nats per answer token, float64 ``[F]``.
        """
        ids = torch.cat([self.last, torch.from_numpy(answer[:-1]).to(self.device)])
        target = torch.from_numpy(answer).to(self.device)
        found = []
        with evaluating(self.model):
            known = self._seen(ids[None])
            for part in vectors.split(max(1, batch_tokens // len(ids))):
                with self._steered(part, known):
                    given = ids.expand(len(part), -1)
                    logits = self._run(self.model, given, self._memories(len(part))).logits
                flat, wanted = logits.flatten(0, 1), target.repeat(len(part)).to(logits.device)
                chunk = max(1, _CHUNK // flat.shape[-1])
                nll = [
                    F.cross_entropy(flat[i : i + chunk].float(), wanted[i : i + chunk], reduction="none").double().cpu()
                    for i in range(0, len(flat), chunk)
                ]
                found.append(torch.cat(nll).view(len(part), -1).mean(dim=1).numpy())
        return np.concatenate(found)

    @contextmanager
    def _steered(self, vectors: torch.Tensor, known: torch.Tensor) -> Iterator[None]:
        """Add vectors ``[F, d]`` to the site's activation, which is ``known``, ``[1, n, d]``, in every row without them.

        What comes before the site is the same for all vectors. So where the site is a block's output, that block and those
        before it do not run again.
        """
        before = blocks_before(self.backbone, self.module, self.site)
        if before:
            steered = known + vectors[:, None].to(known)
            with activation_set(before, self.module, self.site, steered, self._in_tuple):
                yield
        else:
            with changed(self.module, self.site.io, lambda hidden: hidden + vectors[:, None].to(hidden)):
                yield

    # --------------------------------------------------------------------------------------- answers
    def answers(self, vectors: torch.Tensor, most: int, ends: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
        """What the model says under each vector, greedily.

        Args:
            vectors: ``[F, d]``. most: tokens of an answer. ends: ids that end it. batch_tokens: changes memory, not the result.

        Returns:
            Tokens of each answer, int64, without the one that ends it.

        Raises:
            FloatingPointError: logits that are not finite.
        """
        found: list[np.ndarray] = []
        stop = torch.from_numpy(ends).to(self.device)
        tokens = 1 + most + (0 if self._memory is None else self._memory.get_seq_length())
        with evaluating(self.model):
            for part in vectors.split(max(1, batch_tokens // tokens)):
                found += self._answers(part, most, stop)
        return found

    def _answers(self, vectors: torch.Tensor, most: int, stop: torch.Tensor) -> list[np.ndarray]:
        said: list[list[int]] = [[] for _ in vectors]
        going = torch.arange(len(vectors), device=self.device)
        ids, memory = self.last.expand(len(vectors), 1), self._memories(len(vectors))
        with changed(
            self.module, self.site.io, lambda hidden: hidden + vectors[going.to(vectors.device)][:, None].to(hidden)
        ):
            for _ in range(most):
                out = self._run(self.model, ids, memory)
                memory, logits = out[memory_name(self.model)], out.logits[:, -1]
                if not torch.isfinite(logits).all():
                    raise FloatingPointError("logits")
                chosen = logits.argmax(dim=-1).to(self.device)
                goes = ~torch.isin(chosen, stop)
                for row, token in zip(going[goes].tolist(), chosen[goes].tolist(), strict=True):
                    said[row].append(token)
                if not goes.any():
                    break
                if not goes.all():
                    memory.batch_select_indices(goes.nonzero().flatten())
                    going = going[goes]
                ids = chosen[goes][:, None]
        return [np.asarray(tokens, dtype=np.int64) for tokens in said]


class Seen:
    """What a forward pass showed.

    Attributes:
        hidden: the site's activation. in_tuple: whether blocks return tuples.
    """

    hidden: torch.Tensor
    in_tuple: bool


@contextmanager
def watched(backbone: Backbone, module: nn.Module, site: Site) -> Iterator[Seen]:
    """See a site's activation in the forward pass that is run inside."""
    seen = Seen()

    def look(hidden: torch.Tensor) -> torch.Tensor:
        seen.hidden = hidden
        return hidden

    def form(_block: Any, _args: Any, output: Any) -> None:
        seen.in_tuple = isinstance(output, tuple)

    handle = backbone.blocks[0].register_forward_hook(form)
    try:
        with changed(module, site.io, look):
            yield seen
    finally:
        handle.remove()


@contextmanager
def changed(module: nn.Module, io: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Pass a module's output, or its input, through a function."""

    def after(_module: Any, _args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    def before(_module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    if io == "output":
        handle = module.register_forward_hook(after)
    else:
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def blocks_before(backbone: Backbone, module: nn.Module, site: Site) -> list[nn.Module]:
    """The block whose output a site is, and those before it; none if it is another site."""
    blocks = list(backbone.blocks)
    at = next((i for i, block in enumerate(blocks) if block is module and site.io == "output"), -1)
    # Where later blocks use the keys of earlier ones, these must run.
    shared = getattr(backbone.config.get_text_config(), "num_kv_shared_layers", 0)
    return [] if shared else blocks[: at + 1]


@contextmanager
def activation_set(
    before: Sequence[nn.Module], module: nn.Module, site: Site, hidden: torch.Tensor, in_tuple: bool
) -> Iterator[None]:
    """Give a site an activation; the blocks before it do not run.

    Args:
        before: see :func:`blocks_before`. in_tuple: whether blocks return tuples.
    """
    with ExitStack() as stack:
        for block in before:
            stack.enter_context(_idle(block, in_tuple))
        stack.enter_context(changed(module, site.io, lambda _: hidden))
        yield


@contextmanager
def _idle(block: nn.Module, in_tuple: bool) -> Iterator[None]:
    """Let a block return what it is given, in the form in which blocks of its kind return theirs."""
    own = block.__dict__.get("forward")  # accelerate's, where it has placed the block
    block.forward = lambda hidden_states, *_args, **_kwargs: (hidden_states,) if in_tuple else hidden_states
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own
