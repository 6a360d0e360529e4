"""Runs many random mask programs and checks every proof against the real masks.

python tests/passes/fuzz_masks.py --programs 100000
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import random
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from mask_grammar import Grammar, compiled, inputs
from mask_programs import Recorded

from sparse_compiler.ir.mask import Proved


def run(seed: int, dynamic_share: float) -> tuple[str, str]:
    """The outcome of one program (proved, refuted, unknown, invalid, wrong) and its text."""
    chance = random.Random(seed)
    square, dynamic = chance.random() < 0.6, chance.random() < dynamic_share
    text = Grammar(chance, square).program()
    program = compiled(text)
    # Equal sizes become one symbol: what is traced must differ where what is run may.
    traced = (2, 6, 6) if square else (2, 5, 7)
    shapes = [(2, 5, 5), (3, 7, 7)] if square else [(3, 4, 9), (2, 9, 3)]
    shapes = shapes if dynamic else [traced, traced]
    try:
        program(*inputs(*traced))
    except (RuntimeError, IndexError, TypeError):
        return "invalid", text  # e.g. an additive term of no float type
    try:
        found = Recorded(program, inputs(*traced), dynamic)
        if isinstance(found.proof, Proved):
            for n, shape in enumerate(shapes):
                found.check(inputs(*shape, seed=seed * 2 + n))
        return type(found.proof).__name__.lower(), text
    except Exception:  # noqa: BLE001 - whatever happens is a finding
        return "wrong", f"{text}  # dynamic={dynamic}\n{traceback.format_exc(limit=-3)[-1500:]}"


def main() -> int:
    """Prints the counts; 1 if any proof was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first program")
    parser.add_argument("--dynamic", type=float, default=0.05, help="share with symbolic sizes")
    parser.add_argument("--out", type=Path, help="JSON file for the counts")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    counts: collections.Counter[str] = collections.Counter()
    start = time.perf_counter()
    for seed in range(options.seed, options.seed + options.programs):
        outcome, text = run(seed, options.dynamic)
        counts[outcome] += 1
        if outcome == "wrong":
            print(f"-- wrong: program {seed}\n{text}", flush=True)
    seconds = time.perf_counter() - start
    result = {"programs": options.programs, **counts, "seconds": round(seconds, 1)}
    result.setdefault("wrong", 0)
    print(json.dumps(result))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(counts["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
