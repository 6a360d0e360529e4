"""transformers models: compile the prefill, keep decode dense, undo it again.

``torch.compile(model).generate()`` compiles nothing, because ``generate`` is looked up on the
original module and calls its own forward. So ``compile`` replaces the forward of the instance.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparse_compiler.backend import minference, parse_options
from sparse_compiler.errors import OptionInvalid
from sparse_compiler.search.published_config import check_model

__all__ = ["compile", "restore"]

_STATE = "_sparse_compiler_forward"


def compile(model: nn.Module, *, dynamic: bool | None = None, **options: Any) -> nn.Module:
    """Make ``model(...)`` and ``model.generate(...)`` use sparse attention for long prompts.

    A call with one new token (decode) goes to the model's own forward, dense, with the cache as it
    is; every other call goes to the compiled one.

    Args:
        model: a transformers model, or any module whose first tensor argument is [B, L, ...].
        dynamic: as for ``torch.compile``; None compiles the second length for all lengths.
        options: as for the backend's ``options``.
    Returns:
        The same model.
    Raises:
        OptionInvalid: an option is wrong, or the model is compiled already.
        ConfigCorrupt: the configuration is broken, or of a model with other layers or heads.
    """
    config = parse_options(options).config
    if config is not None:
        check_model(config, model)
    if _STATE in model.__dict__:
        raise OptionInvalid(
            f"model {type(model).__name__}",
            "one that is not compiled yet",
            "a model that sparse_compiler.compile has already changed",
            fix="Call sparse_compiler.restore(model) first.",
        )
    original = model.forward
    had_own = "forward" in model.__dict__
    compiled = torch.compile(original, backend=minference, dynamic=dynamic, options=options)
    model.__dict__[_STATE] = original if had_own else None
    model.forward = _choose(original, compiled)
    return model


def _choose(original: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (original if _is_decode(args, kwargs) else compiled)(*args, **kwargs)

    return forward


def _is_decode(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """One new token per sequence: the ids or embeddings have a second dimension of 1."""
    for name in ("input_ids", "inputs_embeds"):
        tensor = kwargs.get(name)
        if isinstance(tensor, torch.Tensor):
            return tensor.dim() >= 2 and tensor.shape[1] == 1
    first = next((a for a in args if isinstance(a, torch.Tensor)), None)
    return first is not None and first.dim() >= 2 and first.shape[1] == 1


def restore(model: nn.Module) -> nn.Module:
    """Undo ``compile``; does nothing for a model that it has not changed."""
    if _STATE in model.__dict__:
        original = model.__dict__.pop(_STATE)
        del model.forward
        if original is not None:
            model.forward = original
    return model
