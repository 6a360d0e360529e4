"""``minference tune``: a progress bar around ``runtime.tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from sparse_compiler.runtime.tune import Tuning

__all__ = ["print_tuning", "tune_command"]


def tune_command(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the constants to this file too.")
    ] = None,
    device: Annotated[int, typer.Option(min=0, help="Number of the CUDA device.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Short lengths only, less exact.")] = False,
    keep: Annotated[
        bool, typer.Option("--store/--no-store", help="Keep the constants for this user.")
    ] = True,
) -> None:
    """Measure this device for a minute or two and keep the cost model's constants.

    They decide which tile a site gets and from which length sparse attention pays.
    """
    from sparse_compiler.errors import ExecutorUnavailable
    from sparse_compiler.runtime.tune import store, tune

    console = Console()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("bandwidths", total=None)

            def show(what: str, done: int, steps: int) -> None:
                progress.update(task, description=what, completed=done, total=steps)

            tuning = tune(device=device, quick=quick, progress=show)
    except ExecutorUnavailable as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(2) from error
    print_tuning(tuning, console)
    if keep:
        console.print(f"Kept in {store(tuning)}.")
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(tuning), indent=1) + b"\n")
        console.print(f"Written to {json_file}.")


def print_tuning(tuning: Tuning, console: Console) -> None:
    """The constants of every tile and how well they explain what was measured."""
    table = Table(title=f"{tuning.device}: ms per unit of work")
    names = ("matrix / Tflop", "exponent / G", "gather / M", "test / M", "programs / k")
    for name in ("tile", *names, "median error", "worst"):
        table.add_column(name, justify="left" if name == "tile" else "right")
    for key, tile in tuning.constants.tiles.items():
        numbers = (tile.matrix, tile.exponent, tile.gather, tile.test, tile.program)
        table.add_row(
            key,
            *(f"{number:.4g}" for number in numbers),
            *(f"{errors.get(key, 0.0):.1%}" for errors in (tuning.errors, tuning.worst)),
        )
    console.print(table)
    c = tuning.constants
    console.print(
        f"L2 {c.l2:.3g}, memory {c.hbm:.3g}, misses {c.miss:.3g} ms per GB; launch "
        f"{c.launch * 1e3:.2g} us; selection {c.select:.3g} ms + {c.select_key:.3g} per M keys "
        f"+ {c.select_pair:.3g} per G block pairs; scoring rows {c.score_start:.3g} ms "
        f"+ {c.score_row:.3g} per M rows + {c.score:.3g} per Tflop"
    )
