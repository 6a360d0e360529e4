"""Launching compiled Triton kernels without the bookkeeping of a first launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["Launcher"]

_MOST = 4096


class Launcher:
    """Remembers what Triton compiled for which arguments.

    ``kernel[grid](...)`` binds and classifies every argument anew, 20-40 us on the host: more than
    a short prompt's kernel takes. What Triton specialises on is the alignment of pointers and the
    values of strides; everything else must be a plain number of a fixed type.
    """

    def __init__(self) -> None:
        self._compiled: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def __call__(
        self,
        kernel: Any,
        programs: int,
        tensors: Sequence[Tensor],
        strides: Sequence[int],
        numbers: Sequence[float],
        **options: int,
    ) -> None:
        """Launch ``kernel(*tensors, *strides, *numbers)`` on the current device.

        Args:
            kernel: a ``@triton.jit`` function.
            programs: of the one-dimensional grid.
            tensors: operands; the first is on the current device.
            strides: integers that the kernel specialises on.
            numbers: floats, and integers below 2**31 that it does not specialise on.
            options: ``num_warps`` and ``num_stages``.
        """
        key = (
            id(kernel),
            tensors[0].device,
            tuple(strides),
            tuple([tensor.data_ptr() & 15 for tensor in tensors]),
            *options.values(),
        )
        found = self._compiled.get(key)
        if found is not None:
            found[1][(programs, 1, 1)](*tensors, *strides, *numbers)
            return
        compiled = kernel[(programs,)](*tensors, *strides, *numbers, **options)
        if compiled is not None:  # the interpreter compiles nothing
            if len(self._compiled) >= _MOST:
                self._compiled.clear()
            # The kernel is kept too: its id is part of the key and must not be given to another.
            self._compiled[key] = (kernel, compiled)
