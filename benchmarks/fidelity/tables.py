"""Results as tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.fidelity.results import DENSE, Cell, Results, Tally

__all__ = ["kept_text", "print_results", "short_layer"]


_MANY = 500
"""Answers from which a third digit says something."""


def kept_text(tally: Tally) -> str:
    """``62/64 .97 (.89-.99)``: of dense's right answers those kept, their share, its 95 % interval.

    Three digits where there are many answers.
    """
    if tally.kept is None:
        return "dense: 0 right"
    digits = 3 if tally.dense_right >= _MANY else 2
    share, low, high = (_share(value, digits) for value in (tally.kept, *tally.kept95))
    return f"{tally.both}/{tally.dense_right} {share} ({low}-{high})"


def print_results(results: Results, console: Console) -> None:
    """Everything that was measured, and what was not."""
    console.print(
        f"{results.model}, {results.dtype}, {results.device}; {results.seconds:.0f} s. "
        f"Filler text: sha256 {results.haystack_sha256}"
    )
    for tokens in dict.fromkeys(cell.tokens for cell in results.cells):
        cells = [cell for cell in results.cells if cell.tokens == tokens]
        if any(not cell.loss for cell in cells):
            console.print(_answers(results, tokens, cells))
        if any(cell.loss for cell in cells):
            console.print(_losses(tokens, cells))
        if any(row.tokens == tokens for row in results.layers):
            console.print(_layers(results, tokens))
    console.print(_ways(results))
    for way in results.ways:
        for failure in way.failures:
            console.print(
                f"{way.name} failed at {failure.tokens} tokens in {failure.task}: {failure.error}",
                style="red",
                markup=False,
            )
    if results.stopped:
        console.print(f"Stopped {results.stopped}.", style="yellow")


def _share(value: float, digits: int) -> str:
    """Without rounding anything below 1 up to 1 or above 0 down to 0."""
    text = f"{value:.{digits}f}"
    if float(text) == 1 and value < 1:
        return ">." + "9" * digits
    if float(text) == 0 and value > 0:
        return f"<.{1:0{digits}d}"
    return text if value == 1 else text.removeprefix("0")


def short_layer(path: str) -> str:
    """The layer's number where its path holds one, else the path."""
    return next((part for part in path.split(".") if part.isdecimal()), path)


def _table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in names:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _density(cell: Cell) -> str:
    return "" if cell.density is None else f"{cell.density:.3f}"


def _sections(cells: list[Cell]) -> Iterator[tuple[str, list[Cell]]]:
    for task in dict.fromkeys(cell.task for cell in cells):
        yield task, [cell for cell in cells if cell.task == task]


def _answers(results: Results, tokens: int, cells: list[Cell]) -> Table:
    table = _table(
        f"{tokens} tokens: answers kept of those that dense has right",
        ("task", "variant"),
        ("right", "kept (95 %)", "density", "prefill, s"),
    )
    for task, members in _sections([cell for cell in cells if not cell.loss]):
        table.add_section()
        for number, cell in enumerate(members):
            seconds = results.way(cell.variant).median_s(tokens)
            table.add_row(
                task if number == 0 else "",
                cell.variant,
                f"{cell.tally.right}/{cell.tally.asked}",
                "" if cell.variant == DENSE else kept_text(cell.tally),
                _density(cell),
                "" if seconds is None else f"{seconds:.4f}",
            )
    return table


def _losses(tokens: int, cells: list[Cell]) -> Table:
    table = _table(
        f"{tokens} tokens: loss of the next token on text",
        ("variant",),
        ("tokens", "nats a token", "increase", "density"),
    )
    for cell in cells:
        mean = cell.mean_loss
        if mean is not None:
            rise = "" if cell.variant == DENSE else f"{100 * (mean[1] / mean[0] - 1):+.2f} %"
            count = sum(part[0] for part in cell.loss)
            table.add_row(cell.variant, str(count), f"{mean[1]:.4f}", rise, _density(cell))
    return table


def _layers(results: Results, tokens: int) -> Table:
    rows = [row for row in results.layers if row.tokens == tokens]
    table = _table(
        f"{tokens} tokens: layers, on one prompt of {rows[0].task}",
        ("variant", "layer"),
        ("density", "recall", "worst head", "last rows", "error"),
    )
    for variant in dict.fromkeys(row.variant for row in rows):
        table.add_section()
        for number, row in enumerate(row for row in rows if row.variant == variant):
            numbers = (row.density, row.recall, row.least_recall, row.last_recall, row.error)
            name = variant if number == 0 else ""
            table.add_row(name, short_layer(row.layer), *(f"{number:.3f}" for number in numbers))
    return table


def _ways(results: Results) -> Table:
    """Compilation: how many attention sites run sparse, and what the first calls cost."""
    table = _table("variants", ("variant", "sparse sites", "graphs", "first calls, s"), ())
    for way in results.ways:
        first = ", ".join(f"{tokens}: {seconds:.1f}" for tokens, seconds in way.first_s.items())
        stock = way.options is None
        sites = "stock model, eager" if stock else f"{way.rewritten} of {way.sites}"
        table.add_row(way.name, sites, "" if stock else str(way.graphs), first)
    return table
