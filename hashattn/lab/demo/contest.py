"""The contenders of the demo: the same question answered by full attention and by a preset, in turns."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from hashattn.attention import HashAttention
from hashattn.lab.demo.story import contains_answer
from hashattn.lab.demo.turns import Decoding, take_turns
from hashattn.lab.steps import median_and_p99
from hashattn.lab.workload.model import sharing_weights
from hashattn.lab.workload.prefill import ends_of

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

    from hashattn.integrations.attached.report import Report

STOCK, OWN_CACHE = "stock", "full, our cache"
NEW_TOKENS = 40


@dataclass(frozen=True)
class Contender:
    """What one way of attending did with the question.

    Attributes:
        correct: None if nobody knows the answer.
        ms, p99_ms: milliseconds a token, of all but the first one.
        times_own_cache, times_stock: as many tokens per second, by medians, as full attention over a cache that
            appends in place, and as the model that nothing is attached to.
        indexing_seconds: once, before its first token.
        keys_read: share of the visible keys.
    """

    name: str
    answer: str
    correct: bool | None
    ms: float
    p99_ms: float
    tokens_per_second: float
    times_own_cache: float
    times_stock: float
    indexing_seconds: float
    keys_read: float
    bytes_per_step: float
    code_bytes: int
    kv_bytes: int


@dataclass(frozen=True)
class Contest:
    """A prefilled text, whose last token is the next to be read, and a question at its end.

    Attributes:
        cache: of all tokens but the last.
        ids: [1, N], all tokens.
        known: the answer, if anybody knows it.
    """

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    cache: DynamicCache
    ids: Tensor
    known: str | None

    def run(self, preset: str, attn: HashAttention) -> tuple[tuple[Contender, ...], Report, list[str]]:
        """Let the plain model, full attention over our cache and a composition answer, each on a copy of the cache.

        Returns:
            The contenders, what ran where in the last one, and remarks.
        """
        attns = {OWN_CACHE: HashAttention.from_preset("full"), preset: attn}
        models = {STOCK: self.network} | {name: sharing_weights(self.network) for name in attns}
        decodings = {name: self._decoding(model, copy.deepcopy(self.cache)) for name, model in models.items()}
        with warnings.catch_warnings(record=True) as caught, ExitStack() as attached:
            warnings.simplefilter("always")
            handles = {name: attached.enter_context(attn.attach(models[name])) for name, attn in attns.items()}
            take_turns(list(decodings.values()), NEW_TOKENS)
            reports = {name: handle.report() for name, handle in handles.items()}
        remarks = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
        return self._judged(decodings, reports), reports[preset], remarks[:1]

    def read_keys(self, attn: HashAttention, answer: str) -> list[list[int]]:
        """How often [layers][positions] were read while this was written: apart, as counting takes time."""
        tokens = len(self.tokenizer(answer, add_special_tokens=False)["input_ids"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they were heard before
            with attn.attach(self.network, trace=True) as handle:
                take_turns([self._decoding(self.network, copy.deepcopy(self.cache))], max(1, tokens))
                counts: list[list[int]] = handle.reads().tolist()
        return counts

    def _decoding(self, model: PreTrainedModel, cache: DynamicCache) -> Decoding:
        return Decoding(model, cache, self.ids[:, -1:])

    def _judged(self, decodings: Mapping[str, Decoding], reports: Mapping[str, Report]) -> tuple[Contender, ...]:
        paces = {name: median_and_p99(decoding.seconds[1:]) for name, decoding in decodings.items()}
        found = []
        for name, decoding in decodings.items():
            answer, (pace, slow) = self._text(decoding.written), paces[name]
            ran = reports.get(name, reports[OWN_CACHE])  # the plain model reads what full attention reads
            found.append(
                Contender(
                    name,
                    answer,
                    contains_answer(answer, self.known) if self.known else None,
                    ms=pace * 1e3,
                    p99_ms=slow * 1e3,
                    tokens_per_second=1 / pace,
                    times_own_cache=paces[OWN_CACHE][0] / pace,
                    times_stock=paces[STOCK][0] / pace,
                    indexing_seconds=max(0.0, decoding.seconds[0] - pace),
                    keys_read=ran.keys_read,
                    bytes_per_step=ran.bytes_per_step,
                    code_bytes=ran.code_bytes,
                    kv_bytes=ran.kv_bytes,
                )
            )
        return tuple(found)

    def _text(self, written: list[int]) -> str:
        """What was written before the text's end."""
        ends = ends_of(self.network, self.tokenizer)
        cut = next((i for i, token in enumerate(written) if token in ends), len(written))
        return str(self.tokenizer.decode(written[:cut], skip_special_tokens=True)).strip()
