"""Bounds and biases as the ``attend`` kernels take them: their kind, their strides, their checks."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compiler.errors import ShapeMismatch, TensorInvalid

__all__ = ["bias_kind", "bias_strides", "check_bias", "checked_bounds", "operand_strides"]


def bias_kind(bias: Tensor | None) -> str:
    """How a bias is read: a name in ``codegen.spec.BIAS_KINDS``.

    A bias whose rows all hold the same numbers is read once a key, whatever its shape.
    """
    if bias is None:
        return ""
    if bias.ndim == 2:
        return "distance"
    return "key" if bias.shape[2] == 1 or bias.stride(2) == 0 else "row"


def bias_strides(bias: Tensor | None, sizes: tuple[int, int, int, int]) -> list[int]:
    """Strides in elements, 0 where the bias is broadcast, in the order of the kernel's arguments.

    Args:
        bias: as ``Executor.attend``.
        sizes: (B, Hq, Lq, Lk).
    Returns:
        For "distance" (head, place); for "key" (batch, head, key); for "row" (batch, head, row,
        key).
    """
    if bias is None:
        return []
    if bias.ndim == 2:
        return list(bias.expand(sizes[1], -1).stride())
    strides = list(bias.expand(sizes).stride())
    return strides if bias_kind(bias) == "row" else [*strides[:2], strides[3]]


def operand_strides(
    bounds: Tensor | None, bias: Tensor | None, sizes: tuple[int, int, int, int]
) -> dict[str, int]:
    """The strides that ``codegen.offsets`` wants to know of; 0 for what is not there."""
    found = dict.fromkeys((f"bias_stride_{axis}" for axis in "bhlk"), 0)
    axes = {"": "", "key": "bhk", "row": "bhlk", "distance": "hk"}[bias_kind(bias)]
    for axis, stride in zip(axes, bias_strides(bias, sizes), strict=True):
        found[f"bias_stride_{axis}"] = stride
    return found | {"bounds_stride_b": 0 if bounds is None else bounds.stride(0)}


def checked_bounds(bounds: Tensor | None, sizes: tuple[int, int, int, int]) -> Tensor | None:
    """``bounds`` over the whole batch, each entry contiguous; a broadcast batch stays one entry.

    Raises:
        ShapeMismatch: it is not [B, Lq, 2] or [1, Lq, 2].
        TensorInvalid: it is not int32.
    """
    if bounds is None:
        return None
    batch, _, num_q, _ = sizes
    if bounds.ndim != 3 or bounds.shape[0] not in (1, batch) or bounds.shape[1:] != (num_q, 2):
        raise ShapeMismatch("bounds", f"[{batch} or 1, {num_q}, 2]", tuple(bounds.shape))
    if bounds.dtype != torch.int32:
        raise TensorInvalid("bounds", "of int32", bounds.dtype)
    if bounds.shape[0] > 1 and bounds.stride(0) == 0:
        bounds = bounds[:1]
    return bounds.contiguous().expand(batch, -1, -1)


def check_bias(bias: Tensor | None, sizes: tuple[int, int, int, int]) -> None:
    """Refuse a bias that a kernel would read past its end.

    Raises:
        ShapeMismatch: it is neither [B, Hq, Lq, Lk], up to sizes of 1 but the last, nor
            [Hq, Lq + Lk - 1], where Hq may be 1.
        TensorInvalid: it is not of a floating dtype of 16, 32 or 64 bits.
    """
    if bias is None:
        return
    batch, heads, num_q, num_k = sizes
    wanted = (batch, heads, num_q, num_k) if bias.ndim == 4 else (heads, num_q + num_k - 1)
    fits = bias.ndim in (2, 4) and bias.shape[-1] == wanted[-1]
    if not fits or any(
        size not in (1, want) for size, want in zip(bias.shape, wanted, strict=True)
    ):
        expected = f"broadcastable to {sizes} or [{heads} or 1, {num_q + num_k - 1}]"
        raise ShapeMismatch("bias", expected, tuple(bias.shape))
    if not bias.is_floating_point() or bias.element_size() < 2:
        raise TensorInvalid("bias", "of a floating dtype of 16 to 64 bits", bias.dtype)
