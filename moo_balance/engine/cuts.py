"""Where to cut a graph so that K gradients of what lies between two cuts fit into little memory."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from math import inf

from moo_balance.engine.survey import Survey

SMALL = 2**20
"""Numbers, 4 MiB of them in float32: less memory is not worth another cut."""


def finest(survey: Survey) -> list[int]:
    """One cut between any two nodes at which something is kept, where least crosses."""

    def cost(below: int, cut: int) -> float:
        return survey.crossing[cut] + survey.kept(below, start=cut)

    cuts = [min(range(b, a, -1), key=partial(cost, b)) for a, b in pairwise(survey.ends)]
    return [cut for cut in cuts if survey.crossing[cut] < inf]


def sparing(survey: Survey, allowed: float, slack: float = SMALL) -> list[int]:
    """The fewest and narrowest cuts with which no portion needs more than is allowed.

    Where that cannot be, as much more is allowed as it takes, and some slack: memory that one
    portion needs in any case makes cuts elsewhere superfluous.
    """
    blocks = _Blocks(survey)
    allowed = max(allowed, _least(blocks) + slack)
    # From each start on: how many portions, how much crosses their cuts, where the first one ends.
    best = [*[(inf, inf, 0)] * blocks.count, (0, 0.0, 0)]
    for start in reversed(range(blocks.count)):
        for end, kept, need in blocks.needs(start):
            if need <= allowed:
                count, crossing, _ = best[end]
                best[start] = min(best[start], (count + 1, crossing + blocks.crossing[end], end))
            if kept > allowed:
                break
    ends = [0]
    while ends[-1] < blocks.count:
        ends.append(best[ends[-1]][2])
    return [blocks.cuts[end] for end in ends[1:-1]]


def _least(blocks: _Blocks) -> float:
    """What the neediest portion needs, if they are chosen so that it needs least."""
    least = [*[inf] * blocks.count, 0.0]  # from each start on
    for start in reversed(range(blocks.count)):
        for end, kept, need in blocks.needs(start):
            least[start] = min(least[start], max(need, least[end]))
            if kept >= least[start]:
                break
    return least[0]


class _Blocks:
    """What lies between the finest cuts that can be of use: what portions are put together from."""

    def __init__(self, survey: Survey) -> None:
        ends = survey.ends
        undivided = sum(survey.kept(end, start=0) for end in ends)
        useful = [cut for cut in finest(survey) if survey.crossing[cut] < undivided]
        self.cuts = [0, *useful, len(survey.order)]
        self.crossing = [survey.crossing[cut] for cut in self.cuts]
        bounds = [bisect_left(ends, cut) for cut in self.cuts]
        blocks = [ends[first:last] for first, last in pairwise(bounds)]
        self.rows = [sum(survey.rows[end] for end in block) for block in blocks]
        self.late = [[survey.late[end] for end in block if end in survey.late] for block in blocks]
        self.count = len(blocks)

    def needs(self, start: int) -> Iterator[tuple[int, int, float]]:
        """By the end of a portion: numbers that it keeps, and these with what leaves it."""
        cut, kept = self.cuts[start], 0
        for block in range(start, self.count):
            kept += self.rows[block]
            for numbers, complete in self.late[block]:
                kept += numbers if cut < complete else 0
            yield block + 1, kept, kept + self.crossing[block + 1]
