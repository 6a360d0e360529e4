"""What a run measured, as data: counts, intervals, times; written to JSON and read back."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from sparse_compiler.errors import OptionInvalid

__all__ = ["DENSE", "Cell", "Failure", "LayerRow", "Results", "Tally", "Way", "read", "wilson"]

DENSE = "dense"
SCHEMA = 1
_Z95 = 1.959963984540054


def wilson(good: int, total: int, z: float = _Z95) -> tuple[float, float]:
    """Wilson's score interval of a share, both ends in [0, 1]; (0, 1) where nothing was counted.

    Args:
        good, total: 0 <= good <= total.
        z: quantile of the normal distribution; the default gives 95 %.
    """
    if not 0 <= good <= total:
        raise ValueError(f"good must be between 0 and total, but got {good} of {total}")
    if total == 0:
        return 0.0, 1.0
    share, square = good / total, z * z / total
    middle = share + square / 2
    half = z * math.sqrt(share * (1 - share) / total + square / (4 * total))
    # The ends are 0 and 1 exactly where all or none is good; rounding must not move them.
    low = 0.0 if good == 0 else (middle - half) / (1 + square)
    high = 1.0 if good == total else (middle + half) / (1 + square)
    return low, high


class Tally(msgspec.Struct):
    """Answers of one variant beside those of dense on the same prompts.

    Attributes:
        asked: questions.
        dense_right, right: right answers of dense and of the variant.
        both: right in both; ``both / dense_right`` is the share kept.
    """

    asked: int = 0
    dense_right: int = 0
    right: int = 0
    both: int = 0

    def add(self, dense: Sequence[bool], mine: Sequence[bool]) -> None:
        """Count one prompt; the same questions in the same order."""
        for d, m in zip(dense, mine, strict=True):
            self.asked += 1
            self.dense_right += d
            self.right += m
            self.both += d and m

    @property
    def kept(self) -> float | None:
        """Share of dense's right answers that stayed right; None where dense has none."""
        return self.both / self.dense_right if self.dense_right else None

    @property
    def kept95(self) -> tuple[float, float]:
        """Its 95 % interval, as if answers were independent."""
        return wilson(self.both, self.dense_right)


class Cell(msgspec.Struct):
    """One task at one length by one variant.

    Attributes:
        prompts: prompts answered.
        tally: of all answers; empty for ``loss``.
        depths: the same by depth of what is asked for (0 is the beginning), of ``needle``.
        loss: for each prompt of ``loss``: tokens predicted, nats of dense and of the variant, summed.
        densities: for each prompt, computed over allowed pairs, mean of layers; a dense layer is 1.
    """

    task: str
    tokens: int
    variant: str
    prompts: int = 0
    tally: Tally = msgspec.field(default_factory=Tally)
    depths: dict[str, Tally] = {}
    loss: list[tuple[int, float, float]] = []
    densities: list[float] = []

    @property
    def density(self) -> float | None:
        return statistics.fmean(self.densities) if self.densities else None

    @property
    def mean_loss(self) -> tuple[float, float] | None:
        """Nats per predicted token of dense and of the variant."""
        count = sum(part[0] for part in self.loss)
        if not count:
            return None
        return sum(part[1] for part in self.loss) / count, sum(p[2] for p in self.loss) / count


class Failure(msgspec.Struct):
    """A variant that raised; it is not run again at this length."""

    tokens: int
    task: str
    error: str


class Way(msgspec.Struct):
    """One variant.

    Attributes:
        options: of the backend; None for dense, which is the stock model in eager mode.
        sites, rewritten: attention sites of its newest graphs, and those that run sparse.
        graphs: graphs that were compiled.
        first_s: by length, seconds of the first call, compilation included.
        warm_s: by length, seconds of each later call, one prompt each (the prefill alone).
    """

    name: str
    options: dict[str, Any] | None
    sites: int = 0
    rewritten: int = 0
    graphs: int = 0
    first_s: dict[int, float] = {}
    warm_s: dict[int, list[float]] = {}
    failures: list[Failure] = []

    def median_s(self, tokens: int) -> float | None:
        times = self.warm_s.get(tokens)
        return statistics.median(times) if times else None


class LayerRow(msgspec.Struct):
    """One layer of one variant on one prompt; see ``benchmarks/fidelity/layers.py``.

    Attributes:
        density: computed over allowed pairs, mean of heads.
        recall: share of dense attention's weight that lies on kept keys, mean of heads and of rows
            spread over the prompt;  least_recall: of the worst head.
        last_recall: the same over the last rows, mean of heads.
        error: norm of the output's difference from dense attention of the same q, k and v over the
            norm of the latter, on all sampled rows.
    """

    variant: str
    tokens: int
    task: str
    layer: str
    density: float
    recall: float
    least_recall: float
    last_recall: float
    error: float


class Results(msgspec.Struct):
    """A run.

    Attributes:
        stopped: why it ended before everything was measured; "" if it did not.
        seconds: of wall-clock time.
        settings: of the command line.
        haystack_sha256: of the filler text.
    """

    command: str
    device: str
    versions: dict[str, str]
    model: str
    dtype: str
    haystack_sha256: str
    settings: dict[str, Any]
    schema: int = SCHEMA
    started: str = ""
    seconds: float = 0.0
    stopped: str = ""
    ways: list[Way] = []
    cells: list[Cell] = []
    layers: list[LayerRow] = []

    def way(self, name: str) -> Way:
        return next(way for way in self.ways if way.name == name)

    def cell(self, task: str, tokens: int, variant: str) -> Cell:
        """The cell of that name, made if it is new."""
        for cell in self.cells:
            if (cell.task, cell.tokens, cell.variant) == (task, tokens, variant):
                return cell
        self.cells.append(Cell(task, tokens, variant))
        return self.cells[-1]

    def write(self, path: Path) -> None:
        """Replace the file in one step, so that a run that is killed leaves a whole one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")
        os.replace(part, path)


def read(path: Path) -> Results:
    """Read a file that ``Results.write`` made.

    Raises:
        OptionInvalid: it is not there, or is not one.
    """
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Results)
    except (OSError, msgspec.MsgspecError) as error:
        raise OptionInvalid("--from", "a file written by --json", str(error)) from error
    if found.schema != SCHEMA:
        raise OptionInvalid("the schema of --from", str(SCHEMA), found.schema)
    return found
