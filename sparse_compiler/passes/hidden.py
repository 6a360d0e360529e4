"""Which constants in the place of a logit, or added to it, hide a pair."""

from __future__ import annotations

import torch

__all__ = ["hides"]

# A logit would have to be larger than 1e30 - 110 for a pair with this constant to get a weight that
# float32 can hold (exp(-110) is 0 there).
_HIDDEN = -1e30


def hides(value: float, factor: float, dtype: torch.dtype) -> bool:
    """Whether ``value``, multiplied by ``factor`` on its way to softmax, leaves a pair no weight.

    That is what is -1e30 or lower by then, and the lowest number of the dtype in which the value is
    put in, as long as no factor below 1 raises it.
    """
    lowest = torch.finfo(dtype).min if dtype.is_floating_point else float("-inf")
    # 0 * inf is NaN, which no comparison calls hidden.
    return value * factor <= _HIDDEN or (factor >= 1 and value <= lowest)
