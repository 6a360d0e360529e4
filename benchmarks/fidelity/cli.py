"""The command line: ``python -m benchmarks.fidelity``."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.fidelity import results as results_module
from benchmarks.fidelity.figures import check_matplotlib, draw
from benchmarks.fidelity.results import Results
from benchmarks.fidelity.run import Plan, chosen_tasks, measure
from benchmarks.fidelity.subjects import Subject, load_subject
from benchmarks.fidelity.tables import print_results
from benchmarks.fidelity.variants import Variant, default_names, parse_variants
from sparse_compiler.demo.records import Haystack, load_haystack
from sparse_compiler.errors import OptionInvalid, SparseCompilerError

__all__ = ["main"]

_PACKAGES = ("sparse-compiler", "torch", "transformers", "triton", "numpy")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SINGLES = 4
"""Prompts of tasks with one question, for each prompt of the others."""


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> None:
    """Measure, or show what was measured (``--from``); exits with 2 on a wrong option."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = _parser().parse_args(arguments)
    # Piped output has no width of its own.
    console = console or Console(width=None if sys.stdout.isatty() else 110)
    try:
        results = _measured(args, arguments, console)
        print_results(results, console)
        if args.figures:
            for path in draw(results, args.figures):
                console.print(f"wrote {path}")
    except SparseCompilerError as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise SystemExit(2) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fidelity",
        description="Answers kept, loss, density and time of sparse variants beside dense attention.",
        epilog="Figures, tasks and variants are explained in docs/fidelity.md.",
    )
    add = parser.add_argument
    add("--model", default="retriever", help="retriever, or a causal model's name or folder")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    add("--dtype", choices=tuple(_DTYPES), help="default: bfloat16 on cuda, float32 on cpu")
    add("--tokens", type=_numbers, default=[32768], help="lengths, e.g. 32768,131072")
    add("--prompts", type=_positive, default=16, help="of each task and length")
    add(
        "--single-prompts",
        type=_positive,
        help=f"of tasks with one question a prompt; default {_SINGLES} times --prompts",
    )
    add("--variants", type=_names, help="default: dense, auto and every pattern")
    add("--tasks", type=_names, help="default: all that the model has")
    add("--fill", type=float, default=0.25, help="share of the prompt that records fill")
    add("--seed", type=int, default=0)
    add("--text", type=Path, help="filler text; default: the standard library's source")
    add("--layers", action="store_true", help="sample every layer on one prompt a length")
    add(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="backend option of every variant, e.g. inner=eager; may be repeated",
    )
    add(
        "--seconds",
        "--batch-seconds",
        type=float,
        default=float("inf"),
        help="begin nothing new after this long; what was measured is reported",
    )
    add("--json", type=Path, help="write the results here, after every round")
    add("--figures", type=Path, metavar="DIR", help="draw with matplotlib")
    add("--from", dest="source", type=Path, help="show and draw this file; measure nothing")
    return parser


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _numbers(text: str) -> list[int]:
    return list(dict.fromkeys(_positive(part) for part in _names(text)))


def _extra(options: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` as options; a value is JSON where it can be read as such."""
    found: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise OptionInvalid("--option", "KEY=VALUE", option)
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def _measured(args: argparse.Namespace, arguments: Sequence[str], console: Console) -> Results:
    if args.figures:
        check_matplotlib()  # before the work, not after it
    if args.source:
        return results_module.read(args.source)
    variants = parse_variants(args.variants or default_names(), _extra(args.option))
    if not 0 < args.fill <= 1:
        raise OptionInvalid("--fill", "in (0, 1]", args.fill)
    haystack = _haystack(args)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    subject = load_subject(
        args.model,
        device,
        fill=args.fill,
        seed=args.seed,
        haystack=haystack,
        dtype=_DTYPES.get(args.dtype or ""),
    )
    return _run(args, arguments, subject, variants, console)


def _haystack(args: argparse.Namespace) -> Haystack:
    if args.text is None:
        return load_haystack(max(1 << 22, 2 * max(args.tokens)))
    try:
        return Haystack.from_bytes(args.text.read_bytes())
    except OSError as error:
        raise OptionInvalid("--text", "a readable file", str(error)) from error


def _run(
    args: argparse.Namespace,
    arguments: Sequence[str],
    subject: Subject,
    variants: Sequence[Variant],
    console: Console,
) -> Results:
    tasks = chosen_tasks(subject, args.tasks)
    plan = Plan(
        tokens=args.tokens,
        prompts=args.prompts,
        single_prompts=args.single_prompts or _SINGLES * args.prompts,
        seconds=args.seconds,
        layers=args.layers,
    )
    results = Results(
        command=shlex.join(["python", "-m", "benchmarks.fidelity", *arguments]),
        device=_device_name(subject.device),
        versions=_versions(),
        model=subject.name,
        dtype=subject.dtype,
        haystack_sha256=subject.haystack_sha256,
        settings={
            "tokens": plan.tokens,
            "prompts": plan.prompts,
            "single_prompts": plan.single_prompts,
            "tasks": [task.name for task in tasks],
            "fill": args.fill,
            "seed": args.seed,
        },
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("first calls compile", total=1.0)

        def told(text: str, share: float) -> None:
            progress.update(bar, description=text, completed=share)

        def save() -> None:
            if args.json:
                results.write(args.json)

        measure(subject, tasks, variants, plan, results, told=told, save=save)
    if args.json:
        console.print(f"wrote {args.json}")
    return results


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
