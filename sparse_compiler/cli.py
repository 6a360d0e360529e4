"""The command line: ``minference`` and ``python -m sparse_compiler``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sparse_compiler.cli_cache import cache_app
from sparse_compiler.cli_kernels import PASS_ON, kernels_app, run_command

__all__ = ["app", "main"]

app = typer.Typer(
    name="minference",
    help="Long prompts made cheap: dynamic sparse attention by compilation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.add_typer(kernels_app)
app.add_typer(cache_app)


@app.callback()
def _root() -> None:
    """Keeps sub-commands even if there were only one."""


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(min=2048, help="Prompt length.")] = 16384,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts with 4 questions at the end.")] = 8,
    also: Annotated[int, typer.Option(min=1, help="Prompts of each harder kind.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the first prompt.")] = 0,
) -> None:
    """Hide records in a long prompt, ask for them, and compare dense with minference."""
    import torch

    from sparse_compiler.backend import has_cxx_compiler
    from sparse_compiler.demo.measure import DemoPlan
    from sparse_compiler.demo.show import print_result, run_with_progress

    console = Console()
    if device not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(
            f"must be auto, cpu or cuda, but got {device!r}", param_hint="device"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device is available", param_hint="device")
    if device == "cpu" and not has_cxx_compiler():
        console.print(
            "[red]No C++ compiler was found, and PyTorch's CPU code generation needs one.[/red] "
            "Without it the model stays dense with code NO_CXX.\n"
            "Install the package g++ (Debian, Ubuntu) or gcc-c++ (Fedora), then run this again."
        )
        raise typer.Exit(2)
    plan = DemoPlan(tokens=tokens, prompts=prompts, also=also, device=device, seed=seed)
    result = run_with_progress(plan, console)
    print_result(result, console)
    if json_file is not None:
        json_file.write_text(json.dumps(result.as_dict(), indent=2) + "\n")
        console.print(f"Figures written to {json_file}.")
    if result.lost:
        raise typer.Exit(1)


@app.command()
def env() -> None:
    """Versions, devices and the state of the kernel cache, for a bug report."""
    from sparse_compiler.environment import environment

    typer.echo(json.dumps(environment(), indent=2))


@app.command(**PASS_ON)
def explain(context: typer.Context) -> None:
    """Show what happens to every attention of an architecture. See `explain --help`."""
    from sparse_compiler.cli_explain import explain_command

    run_command(explain_command, context)


@app.command(**PASS_ON)
def tune(context: typer.Context) -> None:
    """Measure this device and keep the constants of the cost model. See `tune --help`."""
    from sparse_compiler.cli_tune import tune_command

    run_command(tune_command, context)


@app.command(**PASS_ON)
def search(context: typer.Context) -> None:
    """Find the best pattern of every head at one cost. See `search --help`."""
    from sparse_compiler.cli_search import search_command

    run_command(search_command, context)


def main() -> None:
    """Entry point of the console script."""
    app()
