"""Gemma's tokenizer, from the pieces that a GGUF file holds: transformers makes one without merges of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hashattn.core.extras import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Kinds of pieces, as in SentencePiece: of text, of control, matched before all others, single bytes.
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
SPACE = "▁"


def tokenizer_from_gguf(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file whose tokenizer.ggml.model is "llama", a SentencePiece BPE with scores.

    Raises:
        ValueError: the file holds no such tokenizer.
    """
    fields = require("gguf", "hf", "loading a GGUF file").GGUFReader(path).fields
    kind = fields["tokenizer.ggml.model"].contents() if "tokenizer.ggml.model" in fields else None
    if kind != "llama":
        raise ValueError(f"{str(path)!r} holds a tokenizer of kind {kind!r}; 'llama' (SentencePiece) was expected")
    pieces, scores, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type"))
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {
        f"{name}_token": pieces[fields[f"tokenizer.ggml.{key}_token_id"].contents()] for name, key in names.items()
    }
    return tokenizer_from_pieces(pieces, scores, kinds, **special)


def tokenizer_from_pieces(
    pieces: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    *,
    bos_token: str,
    unk_token: str,
    **special: str,
) -> PreTrainedTokenizerBase:
    """A tokenizer that merges, of all neighbours, those first whose joint piece has the highest score.

    Every text begins with bos_token. A space is the piece "▁", none is added in front; what has no piece becomes bytes.

    Args:
        pieces: of the vocabulary, by their ids.
        scores: higher is merged earlier.
        kinds: NORMAL, CONTROL, USER_DEFINED or BYTE.
        special: eos_token, pad_token and the like.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = [piece.replace(" ", SPACE) for piece in pieces]
    vocab = {name: i for i, name in enumerate(names)}
    mergeable = {n: s for n, s, kind in zip(names, scores, kinds, strict=True) if kind == NORMAL}
    model = models.BPE(vocab, merges(mergeable), unk_token=unk_token, fuse_unk=True, byte_fallback=True)
    built: Any = Tokenizer(model)
    built.normalizer = normalizers.Replace(" ", SPACE)
    built.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")  # none is left: a text is one word
    built.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    for kind, options in ((USER_DEFINED, {"normalized": True}), (CONTROL, {"special": True, "normalized": False})):
        built.add_tokens([AddedToken(n, **options) for n, k in zip(names, kinds, strict=True) if k == kind])
    built.post_processor = processors.TemplateProcessing(
        single=f"{bos_token} $A", pair=f"{bos_token} $A {bos_token} $B", special_tokens=[(bos_token, vocab[bos_token])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token=bos_token, unk_token=unk_token, **special)


def merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, the best first; of equal ones, the longer left part first."""
    found = [
        (score, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    found.sort(key=lambda merge: (-merge[0], -len(merge[1])))
    return [(left, right) for _, left, right in found]
