"""``minference kernels``: which kernels were generated, their sources, and why they were chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from sparse_compiler.cli_cache import short_age, short_size, table_console

if TYPE_CHECKING:
    from sparse_compiler.runtime.cache_contents import Entry
    from sparse_compiler.runtime.cache_group import BinaryFacts

__all__ = ["PASS_ON", "kernels_app", "run_command", "short_spec"]

kernels_app = typer.Typer(
    name="kernels", help="The kernels that were generated here.", no_args_is_help=True
)
_DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
_LETTERS = {"head_dim": "D", "value_dim": "Dv", "groups": "G", "num_warps": "w", "num_stages": "s"}
#: For commands that are imported only when they run: they parse their own arguments.
PASS_ON: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}


def run_command(function: Any, context: typer.Context) -> None:
    """Run a command of another module with the arguments that this one did not read."""
    inner = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
    inner.command()(function)
    typer.main.get_command(inner)(args=list(context.args), prog_name=context.command_path)


def short_spec(spec: dict[str, Any]) -> str:
    """A spec on one line: ``bf16 D128 Dv128 G4 64x64 w4 s3 causal tma``."""
    parts = [_DTYPES.get(str(spec.get("dtype")), "")]
    parts += [f"{letter}{spec[name]}" for name, letter in _LETTERS.items() if name in spec][:3]
    if "block_q" in spec and "block_k" in spec:
        parts.append(f"{spec['block_q']}x{spec['block_k']}")
    parts += [f"{letter}{spec[name]}" for name, letter in _LETTERS.items() if name in spec][3:]
    parts += [name for name, value in spec.items() if value is True]
    return " ".join(part for part in parts if part)


def _resources(known: Sequence[BinaryFacts]) -> str:
    lines = []
    for facts in sorted(known, key=lambda f: (f.function, f.target)):
        parts = [] if facts.registers < 0 else [f"{facts.registers} reg"]
        parts += [f"{short_size(facts.shared)} shared"] if facts.shared >= 0 else []
        parts += (
            [] if facts.stack < 0 else [f"{facts.stack} B spilled" if facts.stack else "no spill"]
        )
        lines.append(f"{facts.function} {facts.target}: {', '.join(parts) or 'unknown'}")
    return "\n".join(lines) or "not compiled here"


@kernels_app.command("list")
def list_kernels() -> None:
    """List the generated kernels with their specs, origins and resource reports."""
    from sparse_compiler.config import cache_directory
    from sparse_compiler.runtime.cache_contents import binaries_of, contents
    from sparse_compiler.runtime.cache_group import SourceFacts

    console, directory = table_console(), cache_directory()
    entries = contents(directory)
    compiled = binaries_of(entries)
    table = Table("name", "template", "spec", "size", "age", "asked for by", "registers, memory")
    count = 0
    for entry in entries:
        facts = None if entry.group is None else entry.group.facts
        if not isinstance(facts, SourceFacts):
            continue
        count += 1
        table.add_row(
            entry.name,
            facts.template.partition(".")[0],
            short_spec(facts.spec),
            short_size(entry.size),
            short_age(entry.modified),
            "\n".join(facts.sites) or "unknown",
            _resources(compiled.get(entry.name, [])),
        )
    if not count:
        console.print(f"No kernels in {directory} yet.", highlight=False, soft_wrap=True)
        return
    console.print(table)


@kernels_app.command("print")
def print_kernel(
    name: Annotated[str, typer.Argument(help="A name from the list, or how it begins.")],
) -> None:
    """Print the source of a generated kernel; plain text when piped."""
    entry = _find(name)
    console = Console()
    if console.is_terminal:
        console.print(Syntax(entry.text, "python", line_numbers=True, word_wrap=False))
    else:
        typer.echo(entry.text, nl=False)


def _find(name: str) -> Entry:
    from sparse_compiler.config import cache_directory
    from sparse_compiler.runtime.cache_contents import contents
    from sparse_compiler.runtime.kernel_cache import SOURCES

    sources = [entry for entry in contents(cache_directory()) if entry.kind == SOURCES]
    exact = [entry for entry in sources if entry.name == name]
    found = exact or [entry for entry in sources if entry.name.startswith(name)]
    if not found:
        known = ", ".join(entry.name for entry in sources[:8]) or "none"
        raise typer.BadParameter(
            f"must begin the name of a kernel in {cache_directory()}, but got {name!r} "
            f"(kernels there: {known}). See `minference kernels list`.",
            param_hint="NAME",
        )
    if len(found) > 1:
        raise typer.BadParameter(
            f"must name one kernel, but {name!r} begins {len(found)}: "
            f"{', '.join(entry.name for entry in found)}. Give more letters.",
            param_hint="NAME",
        )
    if found[0].problem:
        typer.echo(
            f"{found[0].path} is broken: {found[0].problem}. It is not used, and is written again "
            "when needed.",
            err=True,
        )
        raise typer.Exit(1)
    return found[0]


@kernels_app.command("why", **PASS_ON)
def explain_choice(context: typer.Context) -> None:
    """Rank the candidate tiles for a site with predicted times. See `why --help`."""
    from sparse_compiler.why import why_command

    run_command(why_command, context)
