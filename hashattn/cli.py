"""The command line: hashattn demo, bench, explain."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hashattn.attention import HashAttention
from hashattn.bench.cases import AUTO_KEYS, KEYS, SHAPES, Case, parse_keys, parse_shape
from hashattn.presets import PRESETS

EXPECTED = (ValueError, TypeError, ImportError, OSError, RuntimeError)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, or 2 for input that cannot be used."""
    arguments = parser().parse_args(argv)
    arguments.command_line = list(sys.argv[1:] if argv is None else argv)
    try:
        return int(arguments.run(arguments))
    except EXPECTED as error:
        if arguments.debug:
            raise
        print(f"hashattn {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The argument parser with all commands."""
    top = argparse.ArgumentParser(prog="hashattn", description="Attention as search over hashed keys.")
    commands = top.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo", help="find a fact in a long text with full attention and with a preset",
        description="A fact is placed in a long text and asked for, with full attention and with a preset.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    demo.add_argument(
        "--model", metavar="ID|DIR|GGUF", help="hub id, folder or GGUF file; SmolLM2-135M-Instruct if left out"
    )
    demo.add_argument("--preset", default="dashkv_fast", metavar="NAME", help=f"one of {', '.join(PRESETS)}")
    demo.add_argument("--text", metavar="FILE", help="the long text; Shakespeare if left out")
    demo.add_argument("--question", help="your own question about the text; then no fact is placed in it")
    demo.add_argument("--context", type=int, metavar="N", help="tokens of the prompt; about 8000 if left out")
    demo.add_argument(
        "--budget", type=float, metavar="X", help="share of the keys to read; the preset's own if left out"
    )
    demo.add_argument("--device", help="cpu or cuda; cuda if there is one, if left out")
    demo.add_argument("--json", metavar="FILE", help="write all figures to this file")
    demo.add_argument("--plot", metavar="FILE.png", help="write the picture of the keys read to this file")
    demo.set_defaults(run=_demo)

    explain = commands.add_parser(
        "explain", help="the query plan of a preset",
        description="What one decode step of one layer does, reads and keeps.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    explain.add_argument("preset", nargs="?", default="dashkv", help=f"one of {', '.join(PRESETS)}")
    explain.add_argument("--batch", type=int, default=1)
    explain.add_argument("--q-heads", type=int, default=32)
    explain.add_argument("--kv-heads", type=int, default=8)
    explain.add_argument("--head-dim", type=int, default=128)
    explain.add_argument("--keys", type=int, default=131072)
    explain.add_argument("--device", default="cpu", help="cpu or cuda; it need not be there")
    explain.set_defaults(run=_explain)

    bench = commands.add_parser(
        "bench", help="time a decode step against the fastest dense attention",
        description="One decode step of one layer, checked against the reference first, then timed against the fastest "
        "dense attention in the same run. Random keys: cost, not quality. Without --shape and --keys it takes minutes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    bench.add_argument("--device", default="cpu", choices=["cpu"], help="what to measure")
    bench.add_argument(
        "--shape", nargs="+", default=list(SHAPES), metavar="HQ/HKVxD:DTYPE", help="query heads/KV heads x head_dim"
    )
    bench.add_argument(
        "--keys", nargs="+", default=[f"{n}:{k}" for n, k in KEYS], metavar="N:K", help="keys : keys kept"
    )
    bench.add_argument("--threads", nargs="+", type=int, default=[1], metavar="T", help="threads of torch and the scan")
    bench.add_argument("--bits", type=int, default=128, help="of the codes, 8 to 1024")
    bench.add_argument(
        "--per", default="kv_head", choices=["kv_head", "query_head"], help="who chooses keys: a group or each head"
    )
    bench.add_argument("--rounds", type=int, default=9, metavar="R", help="turns of which medians are taken")
    bench.add_argument(
        "--auto", action="store_true",
        help='only compare engine="auto" with dense attention, by default from 128 to 8,192 keys',
    )  # fmt: skip
    bench.add_argument("--out", metavar="FILE.json", help="write the results to this file")
    bench.set_defaults(run=_bench)
    for command in (demo, explain, bench):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def _demo(arguments: argparse.Namespace) -> int:
    from hashattn.bench.report import environment
    from hashattn.demo.run import run_demo
    from hashattn.demo.show import picture, save_plot, table

    _check_folder("json", arguments.json)
    _check_folder("plot", arguments.plot)
    result = run_demo(
        model=arguments.model, preset=arguments.preset, text=arguments.text, question=arguments.question,
        context=arguments.context, budget=arguments.budget, device=arguments.device,
    )  # fmt: skip
    print(f"\n{result.tokens:,} tokens were read in {result.prefill_seconds:.0f} s (densely, once for all).")
    print(f"Question: {result.question}\n")
    print(table(result))
    print(f"\nThe answers of full attention and {result.preset} {'agree' if result.agree else 'differ'}.")
    print('"full, our cache" is full attention over a cache that appends in place: the honest baseline for speed.\n')
    print(result.layers)
    if result.note:
        print(f"note: {result.note}")
    print()
    print(picture(result))
    if arguments.json:
        _write(Path(arguments.json), json.dumps(environment(arguments.command_line) | result.as_json()))
    if arguments.plot:
        save_plot(result, arguments.plot)
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    attn = HashAttention.from_preset(arguments.preset)
    print(f"{arguments.preset}: {(PRESETS[arguments.preset].__doc__ or '').splitlines()[0]}\n")
    print(
        attn.explain(
            batch=arguments.batch, q_heads=arguments.q_heads, kv_heads=arguments.kv_heads,
            head_dim=arguments.head_dim, keys=arguments.keys, device=arguments.device,
        )
    )  # fmt: skip
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from hashattn.bench import cpu, report
    from hashattn.threads import thread_count

    if arguments.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {arguments.rounds}")
    threads = [thread_count(t) for t in arguments.threads]
    _check_folder("out", arguments.out)
    keys = [parse_keys(text) for text in arguments.keys]
    if arguments.auto and keys == list(KEYS):
        keys = list(AUTO_KEYS)
    shapes = [parse_shape(text) for text in arguments.shape]
    cases = [Case(*shape, n, k, t) for shape in shapes for n, k in keys for t in threads]
    result = cpu.run(cases, bits=arguments.bits, per=arguments.per, rounds=arguments.rounds, sparse=not arguments.auto)
    print(report.table(result["rows"]))
    print("\nMicroseconds a layer, medians; every case was checked against the reference first.")
    if arguments.out:
        report.write(Path(arguments.out), report.environment(arguments.command_line) | result)
    return 0


def _check_folder(name: str, path: str | None) -> None:
    if path is not None and not Path(path).absolute().parent.is_dir():  # refuse at once what a long run would end in
        raise ValueError(f"--{name} {path}: there is no folder {Path(path).absolute().parent}")


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
