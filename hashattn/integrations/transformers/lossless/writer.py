"""Writer: what generate() writes, token by token, as transformers' own loop does once it has logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput


@dataclass
class Writer:
    """The text so far, and what decides how it goes on.

    Attributes:
        ids: int64 [B, N], prompt and what was written.
        unfinished: bool [B], rows that go on.
        done: whether none does.
    """

    ids: Tensor
    processors: Callable[[Any, Any], Tensor]
    criteria: StoppingCriteriaList
    config: GenerationConfig
    streamer: Any

    def __post_init__(self) -> None:
        config = self.config
        self.unfinished = torch.ones(len(self.ids), dtype=torch.bool, device=self.ids.device)
        self.done = False
        pad = config._pad_token_tensor
        self.pad: Any = None if pad is None else pad.to(self.ids.device)
        ends = [x.eos_token_id for x in self.criteria if hasattr(x, "eos_token_id")]
        self.ends = torch.cat([x.flatten() for x in ends]).to(self.ids.device) if ends else None
        wanted = bool(config.return_dict_in_generate)
        self._scores: list[Tensor] | None = [] if wanted and config.output_scores else None
        self._logits: list[Tensor] | None = [] if wanted and config.output_logits else None
        self._hidden: list[Any] | None = [] if wanted and config.output_hidden_states else None

    @property
    def room(self) -> int:
        """Tokens that may still be written."""
        return int(self.config.max_length) - self.ids.shape[1]

    def scores(self, ids: Tensor, logits: Tensor) -> Tensor:
        """What a token is chosen by after these tokens [B, n]: float32 [B, vocabulary]."""
        return self.processors(ids, logits.to(torch.float32, copy=True))

    def write(self, logits: Tensor, hidden: Any = None) -> Tensor:
        """Write the next token of each row.

        Args:
            logits: [B, vocabulary].
            hidden: states of this position, of each layer.

        Returns:
            int64 [B]; `done` is not yet settled, see :meth:`settle`.
        """
        raw = logits.to(dtype=torch.float32, device=self.ids.device, copy=True)
        scores = self.processors(self.ids, raw)
        for kept, value in ((self._scores, scores), (self._logits, raw), (self._hidden, hidden)):
            if kept is not None:
                kept.append(value)
        if self.config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        tokens = self.padded(tokens, ~self.unfinished)
        self.ids = torch.cat([self.ids, tokens[:, None]], -1)
        given = None if self._scores is None else tuple(self._scores)
        self.unfinished = self.unfinished & ~self.criteria(self.ids, given)
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())
        return tokens

    def padded(self, tokens: Tensor, ended: Tensor) -> Tensor:
        """The tokens [B] that are written, as rows that have ended are padded where there is a token that ends them."""
        return tokens if self.ends is None else torch.where(ended, self.pad, tokens)

    def result(self, cache: Any) -> Any:
        """What generate() returns."""
        if self.streamer is not None:
            self.streamer.end()
        if not self.config.return_dict_in_generate:
            return self.ids
        kept = {"scores": self._scores, "logits": self._logits, "hidden_states": self._hidden}
        outputs: dict[str, Any] = {name: None if value is None else tuple(value) for name, value in kept.items()}
        names = {field.name for field in dataclasses.fields(GenerateDecoderOnlyOutput)}
        name = "cache" if "cache" in names else "past_key_values"  # which transformers 5.24 renamed
        outputs |= {"sequences": self.ids, name: cache}
        return GenerateDecoderOnlyOutput(**outputs)
