"""Spec -> complete, readable Triton source; pure, so that the same spec gives the same bytes."""

from __future__ import annotations

import ast
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sparse_compiler.codegen.spec import KernelSpec

__all__ = ["FORMAT", "PLAIN_SIZES", "emit"]

#: Changes whenever a template's meaning does; part of every header.
FORMAT = 2

#: Sizes that kernels take as ordinary arguments: a new length must not compile a new kernel.
PLAIN_SIZES = {
    "attend.py.jinja": (
        "num_heads",
        "num_q",
        "num_k",
        "left",
        "right",
        "band_slots",
        "block_slots",
        "full_size",
        "lanes_size",
        "columns_size",
        "packed_size",
        "distances_size",
        "blocks_size",
    ),
    "attend_hopper.py.jinja": (
        "row_blocks",
        "num_heads",
        "num_q",
        "num_k",
        "left",
        "right",
        "block_slots",
        "blocks_size",
    ),
    "row_scores.py.jinja": (
        "lines",
        "first_line",
        "first_tile",
        "tiles",
        "parts",
        "row_blocks",
        "key_blocks",
        "key_tiles",
        "chunk_rows",
        "slab_units",
        "num_heads",
        "num_slots",
        "num_q",
        "num_k",
        "left",
        "right",
        "scored",
        "automatic",
        "capacity",
    ),
    "sweep_hopper.py.jinja": (
        "first_line",
        "first_row",
        "row_tiles",
        "key_tiles",
        "segments",
        "span",
        "chunk_rows",
        "num_heads",
        "num_slots",
        "num_q",
        "num_k",
        "left",
        "right",
        "scored",
    ),
    "sketch.py.jinja": (
        "num_q",
        "num_k",
        "kv_heads",
        "every_q",
        "every_k",
        "samples_q",
        "samples_k",
        "aligned",
        "q_chunks",
        "k_chunks",
        "q_programs",
        "key_blocks",
    ),
    "work_list.py.jinja": (
        "row_blocks",
        "num_heads",
        "num_k",
        "left",
        "right",
        "band_slots",
        "block_slots",
        "full_size",
        "lanes_size",
        "columns_size",
        "blocks_size",
    ),
    "probe.py.jinja": (
        "num_groups",
        "num_heads",
        "num_slots",
        "num_q",
        "num_k",
        "left",
        "right",
        "chunks",
        "tiles",
        "distances_size",
        "row_size",
        "probed",
    ),
    "select.py.jinja": (
        "num_heads",
        "num_slots",
        "num_k",
        "left",
        "distances_size",
        "row_size",
        "kept_size",
        "search_steps",
        "slices",
        "full_size",
        "edge_size",
        "columns_size",
        "probed",
        "nearest",
        "everything",
        "probed_first",
        "probed_second",
        "nearest_first",
        "nearest_second",
    ),
}


@lru_cache(maxsize=1)
def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    return Environment(
        loader=loader,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def emit(spec: KernelSpec) -> str:
    """The Python source of the module that holds ``spec``'s kernels.

    Raises:
        jinja2.UndefinedError: the template names something that it was not given.
        SyntaxError: the rendered text is not Python; a bug of the template.
    """
    text = (
        _environment()
        .get_template(spec.template)
        .render(
            spec=spec,
            version=f"format {FORMAT}",
            summary=spec.describe(),
            precision=f', input_precision="{spec.precision}"' if spec.dtype == "float32" else "",
            steps="steps" if spec.interpret else "tl.range",
            plain_sizes=PLAIN_SIZES[spec.template],
        )
    )
    ast.parse(text)
    return text
