"""From measured times to the constants of the cost model: non-negative least squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from sparse_compiler.codegen.constants import DENSE, Constants, TileConstants
from sparse_compiler.codegen.cost import Amounts, linear_parts, predict

__all__ = ["SCORE", "SELECT", "Fit", "Sample", "fit_constants", "fit_scoring", "non_negative_fit"]

SELECT, SCORE = "select", "score"
"""In place of a tile: building an index, and building one by scoring rows."""

_TILE = tuple(field.name for field in fields(TileConstants))
_SELECT = ("select", "select_key", "select_pair")
_SCORE = ("score_start", "score_row", "score")
_TRUST = 1e-5
"""Weight of the prior against one sample: it decides only what no sample tells."""


@dataclass(frozen=True)
class Sample:
    """One measurement.

    Args:
        tile: a key of ``Constants.tiles``, or ``SELECT`` or ``SCORE``.
        name: for people.
        amounts: the work, as the model counts it.
        ms: median time.
    """

    tile: str
    name: str
    amounts: Amounts
    ms: float


@dataclass(frozen=True)
class Fit:
    """Fitted constants and how well they explain the samples.

    Args:
        errors: by tile, the median of \\|predicted / measured - 1\\|.
        worst: the same, the largest.
    """

    constants: Constants
    errors: Mapping[str, float]
    worst: Mapping[str, float]


def non_negative_fit(
    parts: np.ndarray, times: np.ndarray, prior: np.ndarray, *, trust: float = _TRUST
) -> np.ndarray:
    """x >= 0 with the least sum of squared relative errors of ``parts @ x`` against ``times``.

    Args:
        parts: [samples, constants], non-negative.
        times: [samples], positive.
        prior: [constants]; a relative deviation from it costs ``trust`` of a sample's; where it is
            0 nothing pulls.
    Returns:
        [constants] by coordinate descent, which converges since the problem is convex.
    """
    rows = parts / times[:, None]
    # Each constant in units of its prior, or of what would explain the times alone.
    alone = 1.0 / np.maximum(rows.max(axis=0, initial=0.0), 1e-300)
    unit = np.where(prior > 0, prior, np.where(rows.any(axis=0), alone, 0.0))
    rows = rows * unit
    pull = np.where(prior > 0, trust, 0.0)
    normal = rows.T @ rows + np.diag(pull)
    target = rows.sum(axis=0) + pull
    found = np.where(prior > 0, 1.0, 0.0)
    for _ in range(20000):
        before = found.copy()
        for i in np.flatnonzero(normal.diagonal() > 0):
            rest = target[i] - normal[i] @ found + normal[i, i] * found[i]
            found[i] = max(0.0, rest / normal[i, i])
        if np.abs(found - before).max(initial=0.0) <= 1e-10 * max(1.0, found.max(initial=0.0)):
            break
    return found * unit


def fit_constants(samples: Sequence[Sample], start: Constants) -> Fit:
    """Fit tiles, cache misses, selection and scoring of rows.

    Args:
        samples: of any tiles; a tile without samples is left out of the result.
        start: bandwidths, launch time and cache size as measured, and priors for the rest.
    """
    start = replace(start, l2=_best_l2(samples, start))
    dense = [s for s in samples if s.tile == DENSE]
    names = (*_TILE, "miss")
    found = _solve(dense, names, _prior(start, DENSE), start) if dense else {}
    constants = replace(start, miss=found.pop("miss", start.miss))
    tiles = {DENSE: TileConstants(**found) if found else start.tiles[DENSE]}
    for key in dict.fromkeys(s.tile for s in samples if s.tile not in (DENSE, SELECT, SCORE)):
        own = [s for s in samples if s.tile == key]
        tiles[key] = TileConstants(**_solve(own, _TILE, _prior(constants, key), constants))
    select = [s for s in samples if s.tile == SELECT]
    if select:
        parts = np.array(
            [
                [s.amounts.has_index, s.amounts.index_keys / 1e6, s.amounts.index_pairs / 1e9]
                for s in select
            ]
        )
        prior = np.array([getattr(start, name) for name in _SELECT])
        fitted = non_negative_fit(parts, np.array([s.ms for s in select]), prior)
        constants = replace(constants, **dict(zip(_SELECT, map(float, fitted), strict=True)))
    constants = fit_scoring(samples, replace(constants, tiles=tiles))
    if any(sample.tile == SCORE for sample in samples):
        # Calls are timed one by one on an idle device: the host's time is within the others.
        constants = replace(constants, score_host=0.0)
    errors = {
        key: _errors(samples, key, constants) for key in dict.fromkeys(s.tile for s in samples)
    }
    return Fit(
        constants,
        {key: float(np.median(found)) for key, found in errors.items()},
        {key: float(np.max(found)) for key, found in errors.items()},
    )


def fit_scoring(samples: Sequence[Sample], start: Constants) -> Constants:
    """``start`` with the constants of scoring rows, as they are where no sample is of ``SCORE``.

    They are scaled until no sample took longer than they say: a length from which sparse attention
    pays that is too long costs less than one that is too short.

    Args:
        start: with the constants of selection, which are taken off; priors for the rest.
    """
    scored = [s for s in samples if s.tile == SCORE]
    if not scored:
        return start
    parts = np.array(
        [
            [s.amounts.has_scores, s.amounts.scored_rows / 1e6, s.amounts.scored / 1e12]
            for s in scored
        ]
    )
    measured = np.array([s.ms for s in scored])
    index = np.array([predict(start, start.tiles[DENSE], s.amounts)["index"] for s in scored])
    times = np.maximum(measured - index, 0.05 * measured)
    fitted = non_negative_fit(parts, times, np.array([getattr(start, name) for name in _SCORE]))
    fitted *= max(1.0, float((times / (parts @ fitted)).max()))
    return replace(start, **dict(zip(_SCORE, map(float, fitted), strict=True)))


def _best_l2(samples: Sequence[Sample], start: Constants) -> float:
    """ms per 1e9 bytes: a floor that no measurement contradicts."""
    rates = [
        s.ms / (s.amounts.tiles * s.amounts.streamed / 1e9)
        for s in samples
        if s.amounts.tiles and s.amounts.working_set <= start.l2_size
    ]
    return min([start.l2, *rates])


def _prior(constants: Constants, key: str) -> dict[str, float]:
    known = constants.tiles.get(key) or constants.tiles[DENSE]
    return {name: getattr(known, name) for name in _TILE} | {"miss": constants.miss}


def _solve(
    samples: Sequence[Sample],
    names: Sequence[str],
    prior: Mapping[str, float],
    constants: Constants,
) -> dict[str, float]:
    parts = [linear_parts(s.amounts, constants.l2_size) for s in samples]
    matrix = np.array([[row[name] for name in names] for row in parts])
    # Launches, and misses where they are known already, are no business of a tile.
    known = [
        s.amounts.launches * constants.launch
        + (0.0 if "miss" in names else row["miss"] * constants.miss)
        for s, row in zip(samples, parts, strict=True)
    ]
    measured = np.array([s.ms for s in samples])
    times = np.maximum(measured - np.array(known), 0.05 * measured)
    fitted = non_negative_fit(matrix, times, np.array([prior[name] for name in names]))
    return {name: float(value) for name, value in zip(names, fitted, strict=True)}


def _errors(samples: Sequence[Sample], key: str, constants: Constants) -> np.ndarray:
    tile = constants.tiles.get(key, constants.tiles[DENSE])
    found = []
    for sample in samples:
        if sample.tile == key:
            predicted = sum(predict(constants, tile, sample.amounts).values())
            found.append(abs(predicted / sample.ms - 1))
    return np.array(found)
