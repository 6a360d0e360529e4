"""What is known of a mask tensor after the graph that made it has returned it.

The callable of that graph notes a `MaskTag` beside the tensor object. The callable of a graph that
was compiled for such a mask looks the tag up at every call, on the host: the same statement, and
nobody has written to the tensor since. Otherwise it runs the variant that assumes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_compiler.passes.given_masks import Given, GivenMask, Returned
from sparse_compiler.passes.origins import is_of_module

__all__ = ["GivenGraph", "MaskTag", "TaggingGraph", "recognise", "tag_buffers", "tag_of"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MaskTag:
    """What a mask says, and how to see that it is still that mask.

    Args:
        given: band and kind.
        key_mask: bool [B|1, Lk], or None.  bounds: int32 [B|1, Lq, 2], or None.
        version: of the mask's memory; every write to it or to a view of it counts up.
        place: address, sizes and strides; assigning ``.data`` changes them and does not count.
    """

    given: Given
    key_mask: torch.Tensor | None
    bounds: torch.Tensor | None
    version: int
    place: tuple[Any, ...]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (self.key_mask, self.bounds) if t is not None]


_tags: Any = WeakTensorKeyDictionary()
_RANKS = (1, 3, 4)  # of positions, and of masks without and with a dimension of heads


def tag_of(value: Any) -> MaskTag | None:
    """The tag of a mask that nobody has changed since it was tagged, or None."""
    if type(value) is not torch.Tensor or value.dim() not in _RANKS:
        return None
    tag: MaskTag | None = _tags.get(value)
    if tag is None or tag.version != value._version:
        return None
    try:
        return tag if tag.place == _place(value) else None
    except RuntimeError:  # memory of a CUDA graph that has been given back
        return None


def recognise(example_inputs: Sequence[Any]) -> dict[int, Given]:
    """Which of the inputs, as Dynamo hands them to a backend, are tagged masks."""
    tags = ((at, tag_of(value)) for at, value in enumerate(example_inputs))
    return {at: tag.given for at, tag in tags if tag is not None}


def tag_buffers(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Tag the buffers of modules that hold a band: causal masks made once, windows.

    Their values are looked at now, while the graph is compiled, which waits for the device.

    Args:
        gm: the traced graph.
        example_inputs: its inputs, the real tensors.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    for node, value in zip(inputs, example_inputs, strict=False):
        if type(value) is not torch.Tensor or value.dtype != torch.bool or value.dim() != 4:
            continue
        if isinstance(value, FakeTensor) or tuple(value.shape[:2]) != (1, 1):
            continue
        if is_of_module(node) and not value.is_inference() and tag_of(value) is None:
            given = _band_of(value[0, 0])
            if given is not None:
                _tags[value] = MaskTag(given, None, None, value._version, _place(value))


def _band_of(mask: torch.Tensor) -> GivenMask | None:
    """The band that a bool [N, N] holds, None if it holds anything else or hides a diagonal."""
    size = mask.shape[0]
    if not size or mask.shape[1] != size or not bool(mask.diagonal().all()):
        return None
    right = int(mask[0].nonzero()[-1])
    left = size - 1 - int(mask[-1].nonzero()[0])
    # In place: a causal mask of 32768 tokens is 1 GiB, and its distances as integers are 8.
    if not torch.equal(mask, torch.ones_like(mask).tril_(right).triu_(-left)):
        return None
    furthest = size - 1
    return GivenMask(0, None if left == furthest else left, None if right == furthest else right)


class TaggingGraph:
    """Calls a graph that returns masks; takes away what was added to its outputs, and tags them.

    Args:
        compiled: the graph; its outputs are the original ones and then those that ``masks`` name.
        num_outputs: how many are original.
        masks: the outputs that are masks.
    """

    def __init__(
        self, compiled: Callable[..., Any], num_outputs: int, masks: Sequence[Returned]
    ) -> None:
        self.compiled, self.num_outputs, self.masks = compiled, num_outputs, tuple(masks)
        self._given: dict[tuple[int, tuple[int, ...]], Given | None] = {}

    def __call__(self, *args: Any) -> Any:
        outputs = self.compiled(*args)
        kept = list(outputs[: self.num_outputs])
        for mask in self.masks:
            value = kept[mask.position]
            if type(value) is torch.Tensor and value.dim() in _RANKS:
                kept[mask.position] = self._tagged(mask, outputs, args)
        return kept if isinstance(outputs, list) else tuple(kept)

    def _tagged(self, mask: Returned, outputs: Sequence[Any], args: Sequence[Any]) -> Any:
        """The mask, with a tag if nobody else holds its memory: who does could write unnoticed."""
        value = outputs[mask.position]
        given = self._says(mask, tuple(value.shape))
        others = [o for n, o in enumerate(outputs) if n != mask.position]
        if given is None or _shares_memory(value, [*others, *args]):
            return value
        if value.is_inference():
            value = _counted(value)
        key_mask, bounds = (_own(outputs, n, args) for n in (mask.key_mask, mask.bounds))
        _tags[value] = MaskTag(given, key_mask, bounds, value._version, _place(value))
        return value

    def _says(self, mask: Returned, shape: tuple[int, ...]) -> Given | None:
        key = (mask.position, shape)
        if key not in self._given:
            if len(self._given) > 1000:  # a new shape at every call: only the newest matter
                self._given.clear()
            self._given[key] = mask.given(shape)
        return self._given[key]


class GivenGraph:
    """Calls the variant of a graph that assumes what its masks are, if they are that.

    Args:
        assuming: takes the arguments and then the tensors of the masks' tags.
        plain: takes the arguments; right for any.
        masks: position of an argument -> what was assumed.
        written: positions of the arguments that the graph writes to.
    """

    def __init__(
        self,
        assuming: Callable[..., Any],
        plain: Callable[..., Any],
        masks: dict[int, Given],
        written: Sequence[int],
    ) -> None:
        self.assuming, self.plain = assuming, plain
        self.masks, self.written = masks, tuple(written)
        self._warned = False

    def __call__(self, *args: Any) -> Any:
        operands = self._operands(args)
        if operands is not None:
            return self.assuming(*args, *operands)
        if not self._warned:
            self._warned = True
            logger.info(
                "a mask is not the one that this graph was compiled for: it runs as written"
            )
        return self.plain(*args)

    def _operands(self, args: Sequence[Any]) -> list[torch.Tensor] | None:
        found: list[torch.Tensor] = []
        for position, given in self.masks.items():
            tag = tag_of(args[position])
            if tag is None or tag.given != given:
                return None
            writable = [args[n] for n in self.written if n != position]
            if writable and _shares_memory(args[position], writable):
                return None
            found += tag.tensors
        return found


def _own(outputs: Sequence[Any], position: int | None, args: Sequence[Any]) -> torch.Tensor | None:
    """An output in memory that nobody else has."""
    if position is None:
        return None
    value: torch.Tensor = outputs[position]
    rest = [o for n, o in enumerate(outputs) if n != position]
    return value.clone() if _shares_memory(value, [*rest, *args]) else value.contiguous()


def _place(value: torch.Tensor) -> tuple[Any, ...]:
    return value.data_ptr(), value.shape, value.stride()


def _storages(values: Sequence[Any]) -> Iterator[int]:
    for value in values:
        if isinstance(value, torch.Tensor) and _has_storage(value):
            yield value.untyped_storage()._cdata


def _has_storage(value: torch.Tensor) -> bool:
    """Whether a tensor is one block of memory; sparse tensors and subclasses may be several."""
    return value.layout == torch.strided and not hasattr(value, "__tensor_flatten__")


def _shares_memory(value: torch.Tensor, others: Sequence[Any]) -> bool:
    """Whether another value has the storage of ``value``."""
    mine = value.untyped_storage()._cdata
    return any(mine == other for other in _storages(others))


def _counted(value: torch.Tensor) -> torch.Tensor:
    """A tensor over the same memory whose writes are counted, unlike those of inference tensors."""
    with torch.inference_mode(False), torch.no_grad():
        counted = torch.empty(0, dtype=value.dtype, device=value.device)
        return counted.set_(
            value.untyped_storage(), value.storage_offset(), value.shape, value.stride()
        )
