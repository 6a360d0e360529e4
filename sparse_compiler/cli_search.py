"""``minference search``: a model, some prompts and a progress bar around ``search.search``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from sparse_compiler.errors import OptionInvalid, SparseCompilerError

__all__ = ["layers_of", "load_model", "print_result", "read_prompts", "search_command"]

RETRIEVER = "retriever"


def search_command(
    model: Annotated[
        str, typer.Argument(help="retriever (shipped), or a folder or name for transformers.")
    ],
    prompt: Annotated[
        list[Path], typer.Option("--prompt", help="A text file; several may be given.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The configuration to write.")],
    budget: Annotated[
        float, typer.Option(help="Share of dense attention's time for every head, 0 to 1.")
    ] = 0.1,
    candidates: Annotated[
        list[str] | None,
        typer.Option(
            help="name, name(first) or name(first,second): numbers, * for what grows. "
            "Several may be given. Default: every pattern."
        ),
    ] = None,
    cost: Annotated[str, typer.Option(help="model (predicted) or measured.")] = "model",
    error: Annotated[str, typer.Option(help="Of the attention output, or of logits.")] = "output",
    layers: Annotated[str, typer.Option(help="Numbers, e.g. 0-3,7. Default: all.")] = "",
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on from the state beside the output.")
    ] = True,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write a page with attention maps.")
    ] = None,
    embed: Annotated[
        Path | None,
        typer.Option("--embed", help="Also put it into this config.json of a serving engine."),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=0, help="Keep the last tokens of each prompt; 0 keeps all.")
    ] = 0,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "auto",
    executor: Annotated[str, typer.Option(help="As the backend's option.")] = "auto",
    constants: Annotated[
        str, typer.Option(help="Device whose constants predict the cost, e.g. 'NVIDIA H200'.")
    ] = "",
    for_tokens: Annotated[
        int, typer.Option(min=0, help="Length to come: scales numbers and costs; 0: the prompt's.")
    ] = 0,
) -> None:
    """Try patterns on every head, grown until they cost the same, and keep the best of each."""
    from sparse_compiler.search import search
    from sparse_compiler.search.published_config import check_embeddable
    from sparse_compiler.search.report import check_matplotlib, write_report

    console = Console()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    kinds: Any = (cost, error)
    try:
        if report is not None:
            check_matplotlib()
        if embed is not None:
            check_embeddable(embed)
        wanted = layers_of(layers)
        if not output.parent.is_dir():
            raise OptionInvalid("option 'output'", "in a folder that exists", str(output))
        ready, tokenizer = load_model(model, device, dtype)
        ids = read_prompts(prompt, tokenizer, tokens)
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("first prompt", total=None)

            def show(what: str, done: int, steps: int) -> None:
                progress.update(task, description=what, completed=done, total=steps or None)

            result = search(
                ready,
                ids,
                budget=budget,
                candidates=candidates,
                cost=kinds[0],
                error=kinds[1],
                layers=wanted,
                executor=executor,
                device=constants or None,
                for_tokens=for_tokens,
                output=output,
                resume=resume,
                maps=report is not None,
                progress=show,
            )
        if report is not None:
            write_report(result, report, f"Search of {model}")
        if embed is not None:
            result.embed(embed)
    except SparseCompilerError as problem:
        console.print(str(problem), style="red", markup=False, highlight=False)
        raise typer.Exit(2) from None
    print_result(result, console)
    for path in (output, report, embed):
        if path is not None:
            console.print(f"Written: {path}", highlight=False, soft_wrap=True)


def layers_of(text: str) -> list[int] | None:
    """Numbers of ``0-3,7``; None for no text.

    Raises:
        OptionInvalid: it is something else.
    """
    found: list[int] = []
    for part in text.split(",") if text else []:
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise OptionInvalid("option 'layers'", "numbers and ranges such as 0-3,7", text)
        found += range(int(first), int(last if dash else first) + 1)
    if text and not found:
        raise OptionInvalid("option 'layers'", "numbers and ranges such as 0-3,7", text)
    return sorted(set(found)) if text else None


def load_model(model: str, device: str, dtype: str) -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer; None for the retriever, which reads bytes.

    Args:
        model: ``retriever``, or what transformers loads.
        device: cpu, cuda or auto.
        dtype: a name, or auto: the retriever's is float32 on the CPU.
    Raises:
        OptionInvalid: there is no such model, device or dtype.
    """
    import torch

    if device not in ("cpu", "cuda", "auto"):
        raise OptionInvalid("option 'device'", "cpu, cuda or auto", device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise OptionInvalid("option 'device'", "cpu where no CUDA device is available", device)
    if dtype not in ("float32", "bfloat16", "float16", "auto"):
        raise OptionInvalid("option 'dtype'", "float32, bfloat16, float16 or auto", dtype)
    if model != RETRIEVER:
        return _from_transformers(model, device, dtype)
    from sparse_compiler.demo.checkpoint import load_retriever

    usual = "float32" if device == "cpu" else "bfloat16"
    kind = getattr(torch, usual if dtype == "auto" else dtype)
    return load_retriever(kind, device, source="builtin"), None


def _from_transformers(model: str, device: str, dtype: str) -> tuple[Any, Any]:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise OptionInvalid(
            "minference search",
            f"run where transformers is installed, or with the model {RETRIEVER!r}",
            model,
            fix="pip install 'sparse-compiler[transformers]'",
        ) from None
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
        ready: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    except (OSError, ValueError) as problem:
        raise OptionInvalid(
            "the model",
            f"{RETRIEVER!r}, or a folder or name that transformers loads as a causal language model",
            f"{model} ({problem})"[:400],
        ) from None
    return ready.to(device).eval().requires_grad_(False), tokenizer


def read_prompts(paths: list[Path], tokenizer: Any, tokens: int) -> list[Any]:
    """Token ids, int64 [L], of each file.

    Args:
        tokenizer: None takes the bytes.
        tokens: keep that many at the end, where the question is; 0 keeps all.
    Raises:
        OptionInvalid: a file cannot be read, is empty, or is no text.
    """
    import torch

    found = []
    for path in paths:
        try:
            content = path.read_bytes()
            ids = (
                list(content)
                if tokenizer is None
                else tokenizer(content.decode("utf-8"))["input_ids"]
            )
        except (OSError, UnicodeDecodeError) as problem:
            raise OptionInvalid(
                "a prompt", "a readable file of UTF-8 text", str(problem), where=str(path)
            ) from None
        ids = ids[-tokens:] if tokens else ids
        if len(ids) < 2:
            raise OptionInvalid("a prompt", "of two tokens or more", len(ids), where=str(path))
        found.append(torch.tensor(ids, dtype=torch.int64))
    return found


def print_result(result: Any, console: Console) -> None:
    """How many heads got what, and at which error and cost."""
    table = Table(title=f"Budget {result.budget:g}, {max(result.tokens)} tokens")
    for name in ("layer", "heads by pattern", f"mean error of the {result.kind}", "mean cost"):
        table.add_column(name, justify="left" if name.startswith("heads") else "right")
    for number, layer in enumerate(result.layers):
        if not layer:
            continue
        names: dict[str, int] = {}
        for choice in layer.values():
            names[choice.pattern.name] = names.get(choice.pattern.name, 0) + 1
        ordered = sorted(names.items(), key=lambda item: (-item[1], item[0]))
        table.add_row(
            str(number),
            ", ".join(f"{count} {name}" for name, count in ordered),
            f"{sum(c.error for c in layer.values()) / len(layer):.4f}",
            f"{sum(c.cost for c in layer.values()) / len(layer):.3f}",
        )
    console.print(table)
    for note in result.notes:
        console.print(note, markup=False, highlight=False)
