"""``minference explain``: what the compiler does to an architecture, from its configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from sparse_compiler.errors import OptionInvalid

__all__ = ["explain_command", "model_of"]

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")


def explain_command(
    model: Annotated[
        str,
        typer.Argument(
            help="A config.json, a directory that holds one, or a model type of transformers."
        ),
    ],
    tokens: Annotated[int, typer.Option(min=2, help="Prompt length of the call.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Build this many layers only.")] = 2,
    padded: Annotated[bool, typer.Option("--padded", help="A left-padded batch of two.")] = False,
    attention: Annotated[str, typer.Option(help="auto, sdpa or eager.")] = "auto",
    min_tokens: Annotated[
        str, typer.Option(help="As the option of that name: a number, or auto.")
    ] = "0",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the report to this file.")
    ] = None,
) -> None:
    """Build a model with random weights from its configuration, run one call, and explain it.

    Nothing is downloaded. The call really runs, so keep the prompt short: masks and spellings do not
    depend on its length, only ``SHORT`` does.
    """
    import torch

    from sparse_compiler.explanation import explain, sites_table

    if attention not in ("auto", "sdpa", "eager"):
        raise typer.BadParameter(f"must be auto, sdpa or eager, but got {attention!r}")
    if min_tokens != "auto" and not min_tokens.isdecimal():
        raise typer.BadParameter(f"must be a number or auto, but got {min_tokens!r}")
    console = Console()
    try:
        built = model_of(model, layers, attention)
    except OptionInvalid as problem:
        console.print(f"[red]{escape(str(problem))}[/red]")
        raise typer.Exit(2) from None
    draw = torch.Generator().manual_seed(0)
    rows = 2 if padded else 1
    call: dict[str, Any] = {"input_ids": torch.randint(3, 100, (rows, tokens), generator=draw)}
    if padded:
        call["attention_mask"] = torch.ones_like(call["input_ids"])
        call["attention_mask"][0, : tokens // 4] = 0
    threshold: Any = min_tokens if min_tokens == "auto" else int(min_tokens)
    with torch.inference_mode():
        found = explain(built, (), call, options={"min_tokens": threshold})
    console.print(sites_table(found.sites, title=f"{type(built).__name__}, {tokens} tokens"))
    if not found.sites:
        console.print("No softmax attention was found in the graph.")
    declined = [site for site in found.sites if site.decision != "rewritten"]
    console.print(
        f"{len(found.sites)} attention sites in {len(found.reports)} graphs, "
        f"{len(found.sites) - len(declined)} rewritten, {len(declined)} declined."
    )
    if json_file is not None:
        json_file.write_text(json.dumps(json.loads(found.to_json()), indent=2) + "\n")
        console.print(f"Report written to {json_file}.")


def model_of(model: str, layers: int, attention: str) -> Any:
    """A model of random weights.

    Args:
        model: path of a configuration, or a model type.
        layers: the most that it gets.
        attention: transformers' ``attn_implementation``; ``auto`` is its own choice.
    Raises:
        OptionInvalid: there is no such configuration.
    """
    try:
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    except ImportError:
        raise OptionInvalid(
            "minference explain",
            "run where transformers is installed",
            "no transformers",
            fix="pip install 'sparse-compiler[transformers]'",
        ) from None
    path = Path(model)
    try:
        if path.exists():
            config: Any = AutoConfig.from_pretrained(path, local_files_only=True)
        else:
            config = AutoConfig.for_model(model)
    except (ValueError, OSError) as problem:
        raise OptionInvalid(
            "the configuration",
            "a config.json, a directory that holds one, or a model type of transformers",
            f"{model!r} ({problem})"[:300],
        ) from None
    config = config.get_text_config()
    for name in _LAYERS:
        if getattr(config, name, 0):
            setattr(config, name, min(layers, getattr(config, name)))
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    problems = []
    wanted = None if attention == "auto" else attention
    for kind in (AutoModelForCausalLM, AutoModel):
        try:
            return kind.from_config(config, attn_implementation=wanted).eval()
        except ValueError as problem:
            problems.append(str(problem))
    raise OptionInvalid(
        "the configuration",
        f"of a model that can be built with attention {attention!r}",
        f"{model}: {problems[0]}"[:300],
    )
