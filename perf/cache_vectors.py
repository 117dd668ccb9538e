"""Vectors for a million made-up prompts, spread as those of real prompts are.

The real ones are those of perf/data. A made-up one is a real vector, moved by the difference of two others: so it keeps
the directions in which real ones differ. (Isotropic noise, easier to make, has no directions: in it all that is near is
equally far, and no graph does well.) A rewording moves a vector as a real paraphrase does.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from perf.prompt_pairs import embed_pairs, load_pairs

Matrix = NDArray[np.float32]

CHUNK = 20_000
SHARE = 0.6  # of a difference: a made-up vector is then about as near to its real one as two prompts of a topic are


@cache
def _real() -> tuple[Matrix, Matrix]:
    """Return the vectors of real prompts, and what rewording one adds to it."""
    pairs = [*load_pairs("tune"), *load_pairs("test")]
    vectors = embed_pairs(pairs)
    moves = [vectors[pair.second] - vectors[pair.first] for pair in pairs if pair.label == "paraphrase"]
    return np.stack(list(vectors.values())), np.stack(moves)


def made_up(entries: int) -> Iterator[tuple[int, Matrix]]:
    """Yield (first number, unit vectors) that are the same each time."""
    real, random = _real()[0], np.random.default_rng(0)
    for start in range(0, entries, CHUNK):
        base, one, other = random.integers(len(real), size=(3, min(CHUNK, entries - start)))
        yield start, _units(real[base] + SHARE * (real[one] - real[other]))


def some(entries: int, numbers: Sequence[int]) -> Matrix:
    """Return the made-up vectors of these numbers."""
    found = np.empty((len(numbers), _real()[0].shape[1]), np.float32)
    wanted = np.array(numbers)
    for start, matrix in made_up(entries):
        here = (wanted >= start) & (wanted < start + len(matrix))
        found[here] = matrix[wanted[here] - start]
    return found


def reworded(vectors: Matrix) -> Matrix:
    """Return the vectors of rewordings."""
    moves = _real()[1]
    return _units(vectors + moves[np.random.default_rng(1).integers(len(moves), size=len(vectors))])


def nearest(entries: int, vectors: Matrix) -> list[int]:
    """Return the number of the made-up vector nearest to each of `vectors`, compared with all."""
    best, numbers = np.full(len(vectors), -2, np.float32), np.zeros(len(vectors), np.int64)
    for start, matrix in made_up(entries):
        similarities = vectors @ matrix.T
        places = similarities.argmax(1)
        here = similarities[np.arange(len(vectors)), places]
        numbers = np.where(here > best, places + start, numbers)
        best = np.maximum(best, here)
    return numbers.tolist()


def _units(vectors: Matrix) -> Matrix:
    units: Matrix = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return units.astype(np.float32)
