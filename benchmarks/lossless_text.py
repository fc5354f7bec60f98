"""Checked drafts on real text: what is accepted by kind of text, and whether tokens are the unattached model's.

    python benchmarks/lossless_text.py kinds --model gemma-3-270m --encoder gemma-3-270m-fast --json kinds.json
    python benchmarks/lossless_text.py equal --model smollm2-135m --encoder smollm2-135m-fast --json equal.json

`kinds` runs dashkv_fast along what the model writes greedily behind a window (what a checked draft accepts) and along
the text itself (where a small model is unsure), for prose, Python's own library and retrieval. `equal` writes greedily,
repeated tokens penalised, unattached and with check="dense", drafts as long as may be: in float32 in two batches, and
in bfloat16 one by one, where it also says how often the unattached model differs from itself between a batch of one and
a batch of two. `speed` writes behind one prompt with full attention on the same cache, with checked drafts, and with
drafts that are made wrong.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hashattn import HashAttention
from hashattn.integrations.attached.draft_length import DraftLength
from hashattn.integrations.transformers.lossless.draft import Draft
from hashattn.lab.evaluation.continuation import Continuation, judge, last
from hashattn.lab.evaluation.fidelity import own_text
from hashattn.lab.report import environment, write_json
from hashattn.lab.workload.model import cache_argument, load, name_of
from hashattn.lab.workload.prefill import prefill
from hashattn.lab.workload.retrieval import TASKS
from hashattn.lab.workload.texts import Text, read_text, windows

CODE = "argparse", "typing", "inspect", "subprocess", "tarfile", "zipfile", "doctest", "ast"
KINDS = "prose", "code", "retrieval"
SHARES = 0.05, 0.025
CHECKED = {"check": "dense"}


def code() -> Text:
    """Modules of Python's own library, one behind the other."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return Text("python", "\n".join((folder / f"{name}.py").read_text() for name in CODE))


def prompts(tokenizer: Any, kind: str, tokens: int, count: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """Prompts [1, tokens] of a kind, and the tokens [1, n] that follow in the text."""
    return [(ids.to(device), more.to(device)) for ids, more in _prompts(tokenizer, kind, tokens, count)]


def _prompts(tokenizer: Any, kind: str, tokens: int, count: int) -> list[tuple[Tensor, Tensor]]:
    text = code() if kind == "code" else read_text(None)
    if kind == "retrieval":
        tasks = [*TASKS]
        asked = [TASKS[tasks[i % 3]](tokenizer, text.content, tokens, seed=77_000 + i) for i in range(count)]
        return [(question.ids, question.answer) for question in asked]
    return [(ids[:, :tokens], ids[:, tokens:]) for ids in windows(tokenizer, text, tokens + 100, count, seed=5)]


@torch.inference_mode()
def along(model: Any, attn: HashAttention, continuation: Continuation) -> float:
    """Share of positions at which a composition would go on as full attention does."""
    return judge(model, continuation, attn).matched


@torch.inference_mode()
def real_text(model: Any, ids: Tensor, more: Tensor) -> Continuation:
    """Along the text itself; what full attention chooses is to be predicted."""
    text, run = ids[:, :-1], torch.cat([ids[:, -1:], more[:, :-1]], 1)
    cache = prefill(model, text)
    full = model(input_ids=torch.cat([text, run], 1), logits_to_keep=run.shape[1]).logits.argmax(-1)
    return last(text, cache, run, full)


def kinds(model: Any, tokenizer: Any, preset: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Acceptance along greedy text, and along the text itself."""
    rows = []
    for kind in KINDS:
        found: dict[tuple[str, float], list[float]] = {}
        for ids, more in prompts(tokenizer, kind, args.tokens, args.windows, args.device):
            for way, it in (("greedy", own_text(model, ids, args.new)), ("real", real_text(model, ids, more))):
                for share in SHARES:
                    found.setdefault((way, share), []).append(along(model, preset(share), it))
        for (way, share), shares in found.items():
            rows.append(
                {"kind": kind, "along": way, "budget": share, "matched": statistics.fmean(shares), "of": shares}
            )
            print(kind, way, share, f"{rows[-1]['matched']:.3f}", flush=True)
    return rows


def write(model: Any, texts: list[Tensor], new: int, pad: int) -> Tensor:
    """What is written behind prompts of different lengths, padded on the left: int64 [B, new]."""
    longest = max(ids.shape[1] for ids in texts)
    ids = torch.cat([torch.nn.functional.pad(x, (longest - x.shape[1], 0), value=pad) for x in texts])
    mask = torch.stack([torch.arange(longest, device=ids.device) >= longest - x.shape[1] for x in texts]).long()
    options = {"max_new_tokens": new, "do_sample": False, "repetition_penalty": 1.3, "eos_token_id": None}
    written: Tensor = model.generate(ids, attention_mask=mask, pad_token_id=pad, **options)
    return written[:, longest:].cpu()


def parted(one: Tensor, other: Tensor) -> list[int]:
    """The first token in which rows differ; as many as there are where none does."""
    return [
        int(torch.cat([a != b, torch.ones(1, dtype=torch.bool)]).int().argmax())
        for a, b in zip(one, other, strict=True)
    ]


def fourgrams(rows: Tensor) -> tuple[int, int]:
    """Different ones, and all."""
    grams = [tuple(x) for row in rows.tolist() for x in zip(row, row[1:], row[2:], row[3:], strict=False)]
    return len({*grams}), len(grams)


def equal(model: Any, tokenizer: Any, preset: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Ten prompts: whether the tokens are the unattached model's."""
    counts = {"prose": 4, "code": 3, "retrieval": 3}
    texts = [ids for kind, n in counts.items() for ids, _ in prompts(tokenizer, kind, args.tokens, n, args.device)]
    texts = [ids[:, 11 * i :] for i, ids in enumerate(texts)]  # lengths that differ
    pad, rows = 0, []
    batches = [texts[0::2], texts[1::2]]
    stock = torch.cat([write(model, batch, args.new, pad) for batch in batches])
    print("different 4-grams of all", fourgrams(stock), flush=True)
    DraftLength.next = lambda self, most: min(most, self.most)  # type: ignore[method-assign]  # whether it pays or not
    engine = "cpu" if args.device == "cpu" else "gpu"  # where "auto" would draft densely, prompts being short
    searched = preset(0.05).replace(engine=engine)
    with searched.attach(model, check="dense") as handle:
        found = torch.cat([write(model, batch, args.new, pad) for batch in batches])
        use = handle.report().drafts
    assert use is not None
    different, grams = fourgrams(stock)
    rows.append(
        {
            "dtype": "float32",
            "batch": 5,
            "tokens": stock.numel(),
            "equal": int((found == stock).sum()),
            "parted at": parted(found, stock),
            "different 4-grams": different,
            "4-grams": grams,
            "fidelity": use.fidelity,
            "tokens a pass and row": use.tokens_a_pass,
        }
    )
    print(rows[-1], flush=True)
    if args.sixteen:
        model = model.to(torch.bfloat16)
        alone = torch.cat([write(model, [ids], args.sixteen, pad) for ids in texts])
        pairs = torch.cat([write(model, texts[i : i + 2], args.sixteen, pad) for i in range(0, len(texts), 2)])
        with searched.attach(model, check="dense"):
            checked = torch.cat([write(model, [ids], args.sixteen, pad) for ids in texts])
        rows.append(
            {
                "dtype": "bfloat16",
                "tokens": args.sixteen,
                "texts": len(texts),
                "checked parted from stock at": parted(checked, alone),
                "stock in a batch of two parted from stock at": parted(pairs, alone),
            }
        )
        print(rows[-1], flush=True)
    return rows


def speed(model: Any, tokenizer: Any, preset: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds a token on one cache: full attention, checked drafts, and drafts that are made wrong on purpose."""
    ids, _ = prompts(tokenizer, "prose", args.tokens, 1, args.device)[0]
    held = prefill(model, ids[:, :-1])
    full, searched = HashAttention.from_preset("full"), preset(0.05)
    guess = Draft._guess
    ways = {"full attention": (full, {}), "checked": (searched, CHECKED), "checked, all wrong": (searched, CHECKED)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    drafts = {}
    for _ in range(args.windows + 1):
        for name, (attn, options) in ways.items():
            cache = copy.deepcopy(held)
            if "wrong" in name:
                Draft._guess = lambda *given: (guess(*given) + 1) % 1000  # type: ignore[method-assign]
            with attn.attach(model, **options) as handle:
                given = {cache_argument(model): cache, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
                begun = model.generate(ids, max_new_tokens=2, **given)  # encodes the prompt's keys
                first = time.perf_counter()
                model.generate(begun, max_new_tokens=args.new, **given)
                seconds[name].append((time.perf_counter() - first) / args.new)
                drafts[name] = handle.report().drafts
            Draft._guess = guess  # type: ignore[method-assign]
    plain = statistics.median(seconds["full attention"][1:])
    rows = []
    for name, times in seconds.items():
        use, pace = drafts[name], statistics.median(times[1:])
        about = {"drafts": None if use is None else dataclasses.asdict(use), "threads": torch.get_num_threads()}
        rows.append({"way": name, "ms a token": pace * 1e3, "times full attention": plain / pace, **about})
        print(rows[-1], flush=True)
    return rows


WAYS = {"kinds": kinds, "equal": equal, "speed": speed}


def main() -> None:
    """Measure, and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*WAYS])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--encoder", default="smollm2-135m-fast")
    parser.add_argument("--tokens", type=int, default=4096, help="of a prompt")
    parser.add_argument("--windows", type=int, default=2, help="of each kind (kinds); rounds that count (speed)")
    parser.add_argument("--new", type=int, default=100, help="tokens to write behind each prompt")
    parser.add_argument("--sixteen", type=int, default=100, help="the same in bfloat16 (equal); 0 for none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, tokenizer = load(args.model, device=args.device)

    def preset(share: float) -> HashAttention:
        return HashAttention.from_preset("dashkv_fast", pretrained=args.encoder, share=share)

    rows = WAYS[args.what](model, tokenizer, preset, args)
    if args.json:
        about = environment([], args.device) | {"command": " ".join(["python", *sys.argv])}
        write_json(args.json, {**about, "model": name_of(args.model), "rows": rows})


if __name__ == "__main__":
    main()
