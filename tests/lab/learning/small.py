"""A small text, a tokenizer of one token a letter, and captures that are quick to make."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from hashattn.lab.learning import Plan, Shards, capture
from hashattn.lab.workload.texts import Text
from tests.integrations.models import make
from tests.lab.demo.test_story import Letters

TEXT = Text(
    "rooms.txt", "".join(f"Room {i} has {i * 37 % 101} doors, and {i * 53 % 97} windows.\n\n" for i in range(150))
)
PLAN = Plan(tokens=500, sequences=2, retrieval=3, decode=3, queries=250, seed=5)
SHORT = Plan(tokens=60, sequences=3, retrieval=0, decode=3, queries=20)


def small_model(name="llama", **changes):
    return make(name, vocab_size=256, **changes)


def small_capture(out: Path, plan: Plan = SHORT, model=None, texts=(TEXT,), **options) -> Shards:
    return capture(small_model() if model is None else model, Letters(), texts, out, plan, **options)


def save_letters(folder: Path) -> None:
    """A tokenizer of one token a letter as a file, for commands that load it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(folder)


def contents(folder: Path) -> dict[str, str]:
    """What a folder holds: the SHA-256 of each file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}
