"""The command line: hashattn demo, capture, fit, eval, bench, explain."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from hashattn.attention import HashAttention
from hashattn.bench import command
from hashattn.bench.report import check_folder, environment
from hashattn.evaluation import command as evaluation
from hashattn.files import replacing
from hashattn.learning import capture_command, fit_command
from hashattn.presets import PRESETS, preset

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
    demo.add_argument(
        "--encoder", metavar="DIR|NAME|none",
        help="fitted encoders; those that come with the library for its own model if left out, none for unfitted ones",
    )  # fmt: skip
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

    bench = command.add(commands)
    capture = capture_command.add(commands)
    fit = fit_command.add(commands)
    evaluate = evaluation.add(commands)
    for each in (demo, explain, bench, capture, fit, evaluate):
        each.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def _demo(arguments: argparse.Namespace) -> int:
    from hashattn.demo.run import run_demo
    from hashattn.demo.show import picture, save_plot, table

    check_folder("json", arguments.json)
    check_folder("plot", arguments.plot)
    result = run_demo(
        model=arguments.model, preset=arguments.preset, text=arguments.text, question=arguments.question,
        context=arguments.context, budget=arguments.budget,
        encoder=arguments.encoder, device=arguments.device,
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
        with replacing(arguments.json) as path:
            path.write_text(json.dumps(environment(arguments.command_line) | result.as_json()), encoding="utf-8")
    if arguments.plot:
        save_plot(result, arguments.plot)
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    attn = HashAttention.from_preset(arguments.preset)
    print(f"{arguments.preset}: {(preset(arguments.preset).__doc__ or '').splitlines()[0]}\n")
    print(
        attn.explain(
            batch=arguments.batch, q_heads=arguments.q_heads, kv_heads=arguments.kv_heads,
            head_dim=arguments.head_dim, keys=arguments.keys, device=arguments.device,
        )
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
