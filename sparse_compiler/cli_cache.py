"""``minference cache``: what the kernel cache holds, whether it is whole, and emptying it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from sparse_compiler.runtime.cache_contents import Entry

__all__ = ["cache_app", "short_age", "short_size", "table_console"]

cache_app = typer.Typer(
    name="cache", help="The cache of generated and compiled kernels.", no_args_is_help=True
)
_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))


def short_size(size: float) -> str:
    """Bytes as ``512 B``, ``3.4 KB``, ``12 MB``; binary units."""
    for unit in ("B", "KB", "MB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if size >= 10 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GB"


def short_age(modified: float) -> str:
    """Time since ``modified``, e.g. ``3 h``."""
    seconds = max(0.0, time.time() - modified)
    for length, unit in _UNITS:
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def table_console() -> Console:
    """Standard output; piped tables are not folded into 80 columns."""
    console = Console()
    return console if console.is_terminal else Console(width=240)


def _directory() -> Path:
    from sparse_compiler.config import cache_directory

    return cache_directory()


def _say_obstacle(console: Console, directory: Path) -> bool:
    from sparse_compiler.runtime.cache_contents import obstacle

    problem = obstacle(directory)
    if problem:
        console.print(
            f"[red]Kernels are not kept here[/red]: {problem}. "
            "Set SPARSE_COMPILER_CACHE to a directory of your own."
        )
    return bool(problem)


def _row(entry: Entry) -> tuple[str, ...]:
    from sparse_compiler.runtime.cache_group import BinaryFacts

    facts = None if entry.group is None else entry.group.facts
    about = ""
    if isinstance(facts, BinaryFacts):
        about = f"{facts.function or 'launcher'} {facts.target}".strip()
        about += f" of {facts.kernel}" if facts.kernel else ""
    state = f"[red]{entry.problem}[/red]" if entry.problem else "ok"
    size, age = short_size(entry.size), short_age(entry.modified)
    return entry.kind, entry.name, about, size, age, state


@cache_app.command("ls")
def list_cache() -> None:
    """List every group of files with its size, age and state."""
    from sparse_compiler.runtime.cache_contents import contents

    console, directory = table_console(), _directory()
    _say_obstacle(console, directory)
    entries = contents(directory)
    table = Table("kind", "name", "what", "size", "age", "state")
    for entry in entries:
        table.add_row(*_row(entry))
    if entries:
        console.print(table)
    total = short_size(sum(entry.size for entry in entries))
    console.print(f"{directory}: {len(entries)} groups, {total}", highlight=False, soft_wrap=True)


@cache_app.command()
def verify() -> None:
    """Check every file against its sum; names what is broken and then exits with 1."""
    from sparse_compiler.runtime.cache_contents import contents

    console, directory = table_console(), _directory()
    unsafe = _say_obstacle(console, directory)
    entries = contents(directory)
    broken = [entry for entry in entries if entry.problem]
    for entry in broken:
        typer.echo(f"broken: {entry.kind}/{entry.name}: {entry.problem}")
    if broken:
        typer.echo(
            f"{len(broken)} of {len(entries)} groups in {directory} are broken. "
            "They are not used and are written again when needed; `minference cache clear` "
            "removes them."
        )
    else:
        typer.echo(f"{len(entries)} groups in {directory}, all whole")
    if broken or unsafe:
        raise typer.Exit(1)


@cache_app.command("clear")
def clear_cache(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove every generated and compiled kernel; running programs keep what they have loaded."""
    from sparse_compiler.runtime.cache_contents import clear, contents

    console, directory = table_console(), _directory()
    if _say_obstacle(console, directory):
        raise typer.Exit(1)
    entries = contents(directory, lock_timeout=0.0)
    if entries and not yes:
        size = short_size(sum(entry.size for entry in entries))
        typer.confirm(f"Remove {len(entries)} groups ({size}) from {directory}?", abort=True)
    done = clear(directory)
    typer.echo(f"{len(done.removed)} groups removed from {directory}")
    if done.kept:
        typer.echo(f"kept, since another process is writing them: {', '.join(done.kept)}")
        raise typer.Exit(1)
