"""A small random model that reads letters, and its tokenizer, as a folder that any command loads."""

from __future__ import annotations

import string
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.integrations.models import make

LETTERS = ["<pad>", "<eos>", "\n", *string.printable[:95]]


def small_tokenizer() -> PreTrainedTokenizerFast:
    letters = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    letters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>", unk_token="?")


def small_model(**changes):
    return make(vocab_size=len(LETTERS), eos_token_id=1, max_position_embeddings=1024, num_hidden_layers=3, **changes)


def save(folder: Path) -> Path:
    small_model().save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder
