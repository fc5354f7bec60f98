"""Plan: which sequences are captured, and which of their queries are kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hashattn.lab.learning.manifest import DTYPES, Recording
from hashattn.lab.workload.retrieval import TASKS
from hashattn.lab.workload.texts import Text, check_share, windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEEDS = 10_000  # between those of two plans: two that differ in their seed share no prompt


@dataclass(frozen=True, eq=False)
class Prompt:
    """A sequence to capture: what is written down about it, and its tokens, int64 [1, N]."""

    recording: Recording
    ids: Tensor

    def positions(self, queries: int | None) -> Tensor:
        """int64 [T], ascending: the columns whose queries are kept, drawn without repetition by the seed.

        A retrieval prompt's question and answer and the decoded tokens are all among them, even if that makes more.
        """
        asked, keys = self.recording.asked, self.recording.keys
        drawn = asked if queries is None else queries - (keys - asked)
        generator = torch.Generator().manual_seed(self.recording.seed)
        shuffled = torch.randperm(asked, generator=generator)
        return torch.cat([shuffled[: max(0, drawn)].sort().values, torch.arange(asked, keys)])


@dataclass(frozen=True)
class Plan:
    """What is asked of a capture.

    Attributes:
        tokens: length of a sequence before it is continued; in a retrieval prompt the right answer follows.
        sequences: of text, which do not overlap.
        retrieval: prompts with something to be found in the text: needle, multikey and copy in turn.
        decode: tokens that the model itself writes after each.
        temperature: of these; 0 takes the likeliest token.
        queries: how many a sequence are kept, those of the question and of decoded tokens first; None for all.
        layers: numbers; all of full attention if None.
        dtype: of the files, "float16" or "bfloat16".
        share: from where to where in each text, 0 its start and 1 its end.
        seed: of places in the text, prompts, continuations and queries.
    """

    tokens: int = 4096
    sequences: int = 8
    retrieval: int = 4
    decode: int = 64
    temperature: float = 1.0
    queries: int | None = 1024
    layers: tuple[int, ...] | None = None
    dtype: str = "float16"
    share: tuple[float, float] = (0.0, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"tokens": 2, "sequences": 0, "retrieval": 0, "decode": 0, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.sequences + self.retrieval:
            raise ValueError("sequences=0 and retrieval=0 leave nothing to capture: ask for some of either")
        if self.sequences + self.retrieval > SEEDS:
            raise ValueError(
                f"at most {SEEDS} sequences can be captured at once, got {self.sequences + self.retrieval}"
            )
        if self.queries is not None and self.queries < 1:
            raise ValueError(f"queries must be at least 1, or None for all, got {self.queries}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        check_share(*self.share)

    def arguments(self, texts: Sequence[Text]) -> dict[str, Any]:
        """All that the result depends on, as plain types, beside the model, its layers and the dtype."""
        own = {name: value for name, value in dataclasses.asdict(self).items() if name not in ("layers", "dtype")}
        return {"texts": [f"{t.name} (sha256 {t.sha256[:16]})" for t in texts], **own, "share": list(self.share)}

    def prompts(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text]) -> list[Prompt]:
        """The sequences, the texts taking turns.

        Raises:
            ValueError: no text, or one that is too short.
        """
        if not texts:
            raise ValueError("texts must hold at least one text")
        parts = [text.share(*self.share) for text in texts]
        seeds = iter(range((self.seed + 1) * SEEDS, (self.seed + 2) * SEEDS))
        found: list[Prompt] = []
        for turn, part in enumerate(parts):
            count = len(range(turn, self.sequences, len(parts)))
            for ids in windows(tokenizer, part, self.tokens, count, seed=self.seed) if count else ():
                found.append(self._prompt("text", len(found), part, ids, ids.shape[1], next(seeds)))
        for i in range(self.retrieval):
            task, part, seed = list(TASKS)[i % len(TASKS)], parts[i % len(parts)], next(seeds)
            question = TASKS[task](tokenizer, part.content, self.tokens, seed=seed)
            ids = torch.cat([question.ids, question.answer], dim=1)
            found.append(self._prompt(task, i // len(TASKS), part, ids, question.asked, seed))
        return found

    def _prompt(self, kind: str, number: int, text: Text, ids: Tensor, asked: int, seed: int) -> Prompt:
        name = f"{kind}-{number:03d}"
        return Prompt(Recording(name, kind, text.name, ids.shape[1], asked, self.decode, seed), ids)
