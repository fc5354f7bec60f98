"""`hashattn bench`: the options of each benchmark, and what they have in common."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hashattn.lab.bench.cases import CUDA_KEYS, CUDA_SHAPES, KEYS, PER, SHAPES, Case, parse_keys, parse_shape
from hashattn.lab.bench.generate_models import NAMED_SHAPES
from hashattn.lab.bench.recall import Settings
from hashattn.lab.options import (
    DTYPES,
    PRESET,
    add_device,
    add_numbers,
    add_words,
    share_or_own,
)

GENERATE_PRESETS = ("simhash_topk:bits=64", "dashkv_fast")
_SHAPE = ("HQ/HKVxD:DTYPE", "query heads/KV heads x head_dim")
_PICTURE = {"plot": ("FILE.png", "write a picture to this file")}


def cpu(bench: argparse.ArgumentParser) -> None:
    """Add the options of `bench cpu`."""
    add_words(bench, {"shape": _SHAPE}, nargs="+", default=SHAPES)
    _keys(bench, f"{_listed(KEYS)} if left out")
    _bits(bench, "8 to 4096", 128)
    bench.add_argument("--per", choices=PER, default="kv_head", help="who chooses keys: a group or each head")
    _rounds(bench, 9)
    threads = {"threads": "threads of torch and the scan"}
    add_numbers(bench, int, threads, argparse.Namespace(threads=[1]), nargs="+")
    auto = 'only compare engine="auto" with dense attention, by default from 128 to 8,192 keys'
    bench.add_argument("--auto", action="store_true", help=auto)


def gpu(bench: argparse.ArgumentParser) -> None:
    """Add the options of `bench gpu`."""
    own = (f"{_listed([size[1:] for size in CUDA_KEYS if size[0] == batch])} at batch {batch}" for batch in (1, 8))
    _cases(bench, f"{', '.join(own)} if left out")
    _rounds(bench, 11)
    near = "all near keys in one sixty-fourth of the tokens"
    bench.add_argument("--clustered", action="store_true", help=near)
    add_words(bench, _PICTURE)


def kinds(bench: argparse.ArgumentParser) -> None:
    """Add the options of `bench kinds`."""
    _cases(bench, "131072:1024 if left out")
    add_words(
        bench, {"kind": ("WORD", "only kinds with it in their names, such as DASH-KV, and TopK; all if left out")}
    )
    others = "PQ, RaBitQ, Quest and others in place of kinds of steps over binary codes"
    bench.add_argument("--families", action="store_true", help=others)
    _rounds(bench, 11)


def e2e(bench: argparse.ArgumentParser) -> None:
    """Add the options of `bench e2e`."""
    _keys(bench, "32768:1024 131072:1024 if left out")
    _batch(bench, "1 and the most that fit if left out")
    add_numbers(bench, int, {"bits": "of the codes: 64, 128 or 256; 64 if left out"})
    _per(bench, "who chooses keys: a group or each head; both if left out", None)
    _rounds(bench, 5)
    add_words(bench, {"preset": ("NAME", "measure this preset, with its own bits and budget")})
    plain = "leave the model's small operations to PyTorch"
    bench.add_argument("--no-compile", action="store_true", help=plain)


def generate(bench: argparse.ArgumentParser) -> None:
    """Add the options of `bench generate`."""
    which = bench.add_mutually_exclusive_group()
    model = "hub id, folder, GGUF file, smollm2-135m or gemma-3-270m; random weights of a shape if left out"
    add_words(which, {"model": ("ID|DIR|GGUF", model)})
    shape = "of the random weights; llama-3-8b on a GPU and tiny elsewhere, if left out"
    which.add_argument("--shape", choices=NAMED_SHAPES, help=shape)
    add_numbers(bench, int, {"layers": "cut the shape down to so many; its own if left out"})
    tokens = "of the prompt; 65536 131072 on a GPU and 2000 elsewhere, if left out"
    add_numbers(bench, int, {"tokens": tokens}, nargs="+")
    add_numbers(bench, int, {"batch": "sequences"}, argparse.Namespace(batch=[1]), nargs="+")
    attached = f"that are attached; {' '.join(GENERATE_PRESETS)} if left out"
    add_words(bench, {"preset": (PRESET, attached)}, nargs="+", action="extend")
    budget = "share of the keys for presets that take one, or each one's own"
    add_words(bench, {"budget": ("X|own", budget)}, type=share_or_own, default=0.01)
    add_numbers(bench, int, {"steps": "tokens that are timed"}, argparse.Namespace(steps=100))
    dtype = "of the model; bfloat16 on a GPU and float32 elsewhere, if left out"
    bench.add_argument("--dtype", choices=DTYPES, help=dtype)
    add_device(bench)
    chunk = "tokens of a prompt that are read at once; all, or 4096 of more than 131,072, if left out"
    add_numbers(bench, int, {"prefill_chunk": chunk})
    bench.add_argument(
        "--graph", choices=("auto", "never", "always"), help="argument of attach(), which is not given if left out"
    )
    bench.add_argument("--no-compile", action="store_true", help="leave out static caches, which compile the model")
    lossless = "measure each preset's drafts, checked by full attention, as well; only a real model's say how many pass"
    bench.add_argument("--lossless", action="store_true", help=lossless)


def crossover(bench: argparse.ArgumentParser) -> None:
    """Add the options of `bench crossover`."""
    where = "what is measured; a GPU where there is one if left out. On a CPU one set of figures serves all shapes"
    bench.add_argument("--device", choices=("cuda", "cpu"), help=where)
    unkept = 'of a CPU: do not keep what was measured in the cache folder, where engine="auto" looks'
    bench.add_argument("--no-keep", action="store_true", help=unkept)
    _rounds(bench, 9)
    add_words(bench, {"shape": _SHAPE}, default=CUDA_SHAPES[0])
    add_numbers(bench, int, {"batch": "sequences"}, argparse.Namespace(batch=[1, 8]), nargs="+")
    _bits(bench, "64, 128 or 256", 64)
    _per(bench, "who chooses keys: a group or each head", PER)


def recall(bench: argparse.ArgumentParser) -> None:
    """Add the options of `bench recall`."""
    default = Settings()
    data = '"synthetic", or models, of which layers are captured'
    bench.add_argument("--data", nargs="+", default=default.data, metavar="NAME|DIR|GGUF", help=data)
    add_words(bench, {"presets": (PRESET, "which; all if left out")}, nargs="+")
    budget = "share of the keys for presets that take one, or each one's own"
    add_words(bench, {"budget": ("X|own", budget)}, type=share_or_own, default=default.budget)
    numbers = {
        "tokens": "keys",
        "queries": "of the last positions, decoded",
        "train": "steps of hashes that are learned here",
        "seed": "of what is drawn",
        "threads": "of torch and the scan",
    }
    add_numbers(bench, int, numbers, default)
    add_numbers(bench, int, {"layers": "of a model; five of them if left out"}, nargs="+")
    where = (
        "where steps run; on a GPU, those that are served are replayed from graphs, and p99 is kept beside the median"
    )
    bench.add_argument("--device", choices=("cpu", "cuda"), default=default.device, help=where)
    index = """also each preset with this index, where it fits, such as 'FaissBinary("BHNSW32")'"""
    add_words(bench, {"index": ("CALL", index), "text": ("FILE", "that a model reads; Shakespeare if left out")})
    add_words(bench, _PICTURE)


def cuda_cases(
    shapes: Sequence[str],
    batches: Sequence[int] | None,
    keys: Sequence[str] | None,
    default: Sequence[tuple[int, int, int]] = CUDA_KEYS,
) -> list[Case]:
    """Every shape with every batch and number of keys; with neither of the two, the default cases.

    Args:
        default: batch, keys, k.

    Raises:
        ValueError: what parse_shape and parse_keys refuse.
    """
    sizes = list(default)
    if batches or keys:
        pairs = [parse_keys(text) for text in keys or ()] or [(n, k) for batch, n, k in default if batch == 1]
        sizes = [(batch, n, k) for batch in batches or [1] for n, k in pairs]
    return [Case(*parse_shape(s), n, k, batch=batch) for s in shapes for batch, n, k in sizes]


def check_counts(arguments: argparse.Namespace) -> None:
    """Raise ValueError for rounds, batches and the like below 1."""
    for name in ("rounds", "batch", "tokens", "steps", "prefill_chunk"):
        given = getattr(arguments, name, None)
        least = min(given) if isinstance(given, list) else given
        if least is not None and least < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {least}")


def _cases(bench: argparse.ArgumentParser, keys: str) -> None:
    """What the benchmarks of a fused step have in common."""
    add_words(bench, {"shape": _SHAPE}, nargs="+", default=CUDA_SHAPES)
    _keys(bench, keys)
    _batch(bench, "1, with --keys, if left out")
    _bits(bench, "64, 128 or 256", 64)
    _per(bench, "who chooses keys: a group or each head", PER)


def _keys(bench: argparse.ArgumentParser, usual: str) -> None:
    add_words(bench, {"keys": ("N:K", f"keys : keys kept; {usual}")}, nargs="+")


def _batch(bench: argparse.ArgumentParser, usual: str) -> None:
    add_numbers(bench, int, {"batch": f"sequences; {usual}"}, nargs="+")


def _bits(bench: argparse.ArgumentParser, range: str, usual: int) -> None:
    add_numbers(bench, int, {"bits": f"of the codes: {range}"}, argparse.Namespace(bits=usual))


def _per(bench: argparse.ArgumentParser, meaning: str, usual: Sequence[str] | None) -> None:
    bench.add_argument("--per", nargs="+", choices=PER, default=usual, help=meaning)


def _rounds(bench: argparse.ArgumentParser, usual: int) -> None:
    add_numbers(bench, int, {"rounds": "turns, of which medians are taken"}, argparse.Namespace(rounds=usual))


def _listed(sizes: Sequence[Sequence[int]]) -> str:
    return " ".join(f"{n}:{k}" for n, k in sizes)
