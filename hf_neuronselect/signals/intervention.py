"""The intervention engine: what a model gains on a row's answer if a feature of its prompt is twice as strong."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..core import progress
from ..core.digests import cache_dir
from ..core.writing import put
from ..models.batching import logits_budget
from ..models.loading import causal_lm_of, decoding_sae, sae_on, tokenizer_of
from ..models.steering import SteeredModel
from ..rows.encode import SampleEncoder
from ..rows.formats import Conversation
from .base import VERSION, Signal, digest
from .engine import Computed, Engine, register_engine
from .extraction import Extraction
from .forward import place_of

LOSS = "loss"
_WORD = re.compile(
    r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]+"
)
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?")


class FeatureGains(Signal):
    """Gains of some SAE features, where they are active at a row's last prompt token (IGDS, arXiv 2604.25167): sparse.

    ``gain_f = m(h + a_f W_dec[f]) - m(h)``: the model answers the prompt with the vector ``a_f W_dec[f]`` added to the
    SAE's site at every token from the last of the prompt on, ``a_f`` being the activation there. ``m`` compares what it says
    with the row's first answer or, for ``loss``, is minus the loss of that answer, in nats a token; then nothing is generated.

    Gains of a row are kept in ``$HF_HOME/neuronselect/gains``, so that a later call finds them.

    Args:
        measure: a name of :data:`MEASURES`, or ``loss``. answer_tokens: how long a generated answer may be.
        latents: the features. The columns have one name for all sets of features.
    """

    engine = "intervention"
    needs_sae = True
    stored = False
    reads = ("top_k_features",)

    def __init__(self, measure: str, answer_tokens: int, latents: Sequence[int]) -> None:
        self.measure, self.answer_tokens = measure, 0 if measure == LOSS else answer_tokens
        self.latents = sorted(latents)
        self.name = f"gains_on_{digest([self.measure, self.answer_tokens])}"

    def types(self, extraction: Extraction) -> dict[str, pa.DataType]:
        return {f"{self.name}_indices": pa.list_(pa.int32()), f"{self.name}_values": pa.list_(pa.float32())}

    def numbers(self, extraction: Extraction) -> Mapping[str, Any]:
        return {**self.of_one(extraction), "latents": self.latents}

    def of_one(self, extraction: Extraction) -> dict[str, Any]:
        """What moves the gain of one feature, whichever are asked for beside it."""
        sae = {"sae": extraction.sae_state(), "site": extraction.sae_site}
        return {**super().numbers(extraction), **sae, "measure": self.measure, "answer_tokens": self.answer_tokens}


def words_in_common(said: str, wanted: str) -> float:
    """F1 of the words of two texts, in lower case; scripts without spaces count by characters."""
    one, other = (Counter(_WORD.findall(text.lower())) for text in (said, wanted))
    common = (one & other).total()
    return 2 * common / (one.total() + other.total()) if common else 0.0


def same_number(said: str, wanted: str) -> float:
    """1 if the last numbers of two texts, or of the parts after their last ``####``, are equal."""
    one, other = last_number(said), last_number(wanted)
    return float(one is not None and one == other)


def last_number(text: str) -> Decimal | None:
    """The last number of a text, or of the part after its last ``####``, without the commas between thousands."""
    found = _NUMBER.findall(text.rpartition("####")[2])
    return Decimal(found[-1].replace(",", "")) if found else None


MEASURES = {"words": words_in_common, "number": same_number}


@dataclass(frozen=True, eq=False)
class Prompted:
    """A prompt and its first answer.

    Attributes:
        prompt, answer: int64 token ids. text: of the answer. skip: why there is none, else "".
    """

    prompt: np.ndarray
    answer: np.ndarray
    text: str
    skip: str = ""

    @property
    def input_ids(self) -> np.ndarray:
        return np.concatenate([self.prompt, self.answer])

    @property
    def key(self) -> str:
        """A hash of all that is read of the row."""
        lengths = f"{len(self.prompt)} {len(self.answer)} "
        return hashlib.blake2b(lengths.encode() + self.input_ids.tobytes(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Known:
    """What is known of a row, and kept in a file.

    Attributes:
        active: latents that are active at the prompt's last token. gains: of those that were asked for so far.
    """

    active: list[int]
    gains: dict[int, float]

    @classmethod
    def read(cls, file: Path) -> Known | None:
        """From a file; None if there is none, or it is damaged."""
        try:
            found = json.loads(file.read_bytes())
            return cls(found["active"], {int(latent): float(gain) for latent, gain in found["gains"].items()})
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def text(self) -> str:
        return json.dumps({"active": self.active, "gains": self.gains})


@register_engine
class InterventionEngine(Engine):
    """Answers each row's prompt once for every feature, all in one batch, and keeps what that gained."""

    name = "intervention"

    @classmethod
    def state(cls, extraction: Extraction) -> Mapping[str, Any]:
        return extraction.model_state()

    @property
    def tokenizer(self) -> Any:
        return tokenizer_of(self.extraction.spec.source)

    # -------------------------------------------------------------------------------------- reading
    def read(self, conversations: Sequence[Conversation], signals: Sequence[Signal]) -> list[Prompted]:
        options = self.extraction.options
        encoder = SampleEncoder(
            self.tokenizer,
            max_length=options.max_length,
            truncation_side=options.truncation_side,
            marks=("prompt", "answer"),
            chat_template=options.chat_template,
            limits=self.extraction.limits,
        )
        found = []
        for sample in encoder.encode(conversations):
            skip = sample.skip
            for mark in encoder.marks if not skip else ():
                if not sample.marks[mark].any():
                    skip = f"error: no {mark} token within max_length={options.max_length}"
            if skip:
                found.append(Prompted(np.zeros(0, np.int64), np.zeros(0, np.int64), "", skip))
                continue
            end = int(sample.marks["prompt"].argmax()) + 1
            behind = np.flatnonzero(~sample.marks["answer"][end:])  # template tokens, and later turns
            answer = sample.input_ids[end : end + int(behind[0])] if len(behind) else sample.input_ids[end:]
            found.append(Prompted(sample.input_ids[:end], answer, self._texts([answer])[0]))
        return found

    # ------------------------------------------------------------------------------------ computing
    def load(self, signals: Sequence[Signal], rank: int | None = None) -> None:
        assert self.extraction.sae is not None
        decoding_sae(self.extraction.sae, self.extraction.options.layer)
        causal_lm_of(self.extraction.spec, place_of(self.extraction, rank))

    def compute(self, given: Sequence[Prompted], signals: Sequence[Signal], rank: int | None = None) -> Computed:
        columns: dict[str, Any] = {}
        skips: dict[str, list[str]] = {}
        for signal in signals:
            assert isinstance(signal, FeatureGains)
            folder = self.folder(signal)
            rows = [self._row(one, signal, folder, rank) for one in given]
            columns[f"{signal.name}_indices"] = [latents for latents, _, _ in rows]
            columns[f"{signal.name}_values"] = [gains for _, gains, _ in rows]
            skips[signal.name] = [skip for _, _, skip in rows]
        return Computed(columns, skips)

    def folder(self, signal: FeatureGains) -> Path:
        """Where gains are kept, a file a row."""
        moves = [VERSION, self.state(self.extraction), signal.of_one(self.extraction)]
        length = f"-{signal.answer_tokens}" if signal.answer_tokens else ""
        return cache_dir() / "gains" / f"{signal.measure}{length}-{digest(moves)}"

    def _row(
        self, one: Prompted, signal: FeatureGains, folder: Path, rank: int | None
    ) -> tuple[np.ndarray, np.ndarray, str]:
        """Active latents of those asked for, ascending, their gains, and why there are none."""
        latents, gains = np.zeros(0, np.int32), np.zeros(0, np.float32)
        if one.skip:
            return latents, gains, one.skip
        if signal.measure == "number" and last_number(one.text) is None:
            return latents, gains, "error: the answer has no number to compare with; use measure=words"
        file = folder / f"{one.key}.json"
        known = Known.read(file)
        if known is None or set(signal.latents) & set(known.active) - known.gains.keys():
            try:
                known = self._measured(one, signal, known, rank)
            except FloatingPointError:
                return latents, gains, "error: NaN or infinite activations; try dtype float32"
            folder.mkdir(parents=True, exist_ok=True)
            put(file, known.text())
        progress.advance(len(one.prompt) + len(one.answer))
        found = [latent for latent in signal.latents if latent in known.active]
        return np.asarray(found, np.int32), np.asarray([known.gains[latent] for latent in found], np.float32), ""

    def _measured(self, one: Prompted, signal: FeatureGains, known: Known | None, rank: int | None) -> Known:
        """What is known of a row, with the gains of the features asked for."""
        extraction, options = self.extraction, self.extraction.options
        assert extraction.sae is not None
        model = causal_lm_of(extraction.spec, place_of(extraction, rank))
        decoder = decoding_sae(extraction.sae, options.layer)
        steered = SteeredModel(model, decoder.site, one.prompt)
        encoder = sae_on(extraction.sae, options.layer, steered.state.device, options.dtype)
        one_row = torch.zeros(1, dtype=torch.int64, device=steered.state.device)
        activation = encoder.sum_rows(steered.state.float()[None], one_row, 1, options.top_k_features)[0]
        if not torch.isfinite(activation).all():
            raise FloatingPointError("activations")
        active = activation.nonzero().flatten().tolist()
        gains = dict(known.gains) if known is not None else {}
        if missing := sorted(set(signal.latents) & set(active) - gains.keys()):
            latents = torch.tensor(missing, device=activation.device)
            vectors = activation[latents, None] * decoder.directions(latents, steered.state)
            vectors = torch.cat([torch.zeros_like(vectors[:1]), vectors])  # first, the model as it is
            found = self._quality(one, signal, model, steered, vectors)
            if not np.isfinite(found).all():
                raise FloatingPointError("losses")
            gains |= dict(zip(missing, (found[1:] - found[0]).tolist(), strict=True))
        return Known(active, gains)

    def _quality(
        self, one: Prompted, signal: FeatureGains, model: Any, steered: SteeredModel, vectors: torch.Tensor
    ) -> np.ndarray:
        """How good the answer is under each vector, larger is better: float64 ``[F]``."""
        batch_tokens = logits_budget(model, self.extraction.options.batch_tokens)
        if signal.measure == LOSS:
            return -steered.losses(vectors, one.answer, batch_tokens)
        said = steered.answers(vectors, self._most(one, signal), self._ends(model), batch_tokens)
        return np.asarray([MEASURES[signal.measure](text, one.text) for text in self._texts(said)])

    def _texts(self, answers: Sequence[np.ndarray]) -> list[str]:
        return [str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)) for ids in answers]

    def _most(self, one: Prompted, signal: FeatureGains) -> int:
        """Tokens that an answer may have, within the model's positions."""
        positions = self.extraction.limits.positions
        return signal.answer_tokens if positions is None else min(signal.answer_tokens, positions - len(one.prompt))

    def _ends(self, model: Any) -> np.ndarray:
        """Ids that end an answer."""
        given = getattr(model.generation_config, "eos_token_id", None)
        ids = [self.tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])]
        return np.asarray(sorted({one for one in ids if one is not None}), dtype=np.int64)
