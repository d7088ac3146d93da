"""Learning long documents from samples of them: some of the tokens, at the places that they have in the whole text.

Positions that are skipped teach distances without their cost (Zhu et al. 2024, "PoSE: Efficient Context Window Extension of LLMs via
Positional Skip-wise Training"): a sample of 160 tokens of a document of a thousand is read at a fortieth of the attention's cost.
"""

import numpy as np
from numpy.typing import NDArray

RUN = 16
"""Tokens that follow each other in the middle of a sample."""


def sample_places(length: int, room: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Which tokens of a text are read, int [min(length, room)] in order.

    A quarter of them are its first and a quarter its last ones, where fields stand and where a text is summed up; between them stand
    runs of `RUN` tokens with gaps between them, drawn anew each time.

    Args:
      length: of the text, in tokens.
      room: how many can be read; 0: all.
      rng: draws.
    """
    if not 0 < room < length:
        return np.arange(length)
    head = tail = room // 4
    middle = room - head - tail
    runs = max(1, middle // RUN)
    sizes = np.full(runs, middle // runs) + (np.arange(runs) < middle % runs)
    skipped = np.sort(rng.integers(0, length - room, runs, endpoint=True))
    starts = head + skipped + np.cumsum(sizes) - sizes
    between = [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    return np.concatenate([np.arange(head), *between, np.arange(length - tail, length)])
