"""Which rank has which rows of a step, so that none waits long for another's attention.

Attention is the one part of a packed row whose cost follows from its documents. A step's rows stay
the same, and so does what it computes, up to the order of sums.
"""

import heapq
from collections.abc import Sequence

Places = list[int]


def deal_evenly(
    costs: Sequence[int], *, microbatches: int, ranks: int, size: int
) -> list[list[Places]]:
    """Return each rank's microbatches, as places of a step whose rows have these costs.

    Every microbatch has `size` places; those from len(costs) on are fillers. Ranks meet in every
    microbatch, so rows of like cost share one, the dearest first. Within it each row goes to the
    rank with the least so far that has space (Graham 1969, "Bounds on Multiprocessing Timing
    Anomalies"). Where all cost the same, neighbours stay together: microbatch m of rank r has the
    places from (m * ranks + r) * size on.
    """
    total = microbatches * ranks * size
    order = sorted(range(len(costs)), key=lambda place: -costs[place])
    order += range(len(costs), total)
    is_even = len(set(costs)) <= 1
    dealt: list[list[Places]] = [[] for _ in range(ranks)]
    for begin in range(0, total, ranks * size):
        block = order[begin : begin + ranks * size]
        shares = _neighbours(block, size) if is_even else _least_first(block, costs, ranks, size)
        for mine, share in zip(dealt, shares, strict=True):
            mine.append(share)
    return dealt


def dearest_over_mean(costs: Sequence[int], dealt: Sequence[Sequence[Places]]) -> float:
    """Return what the dearest rank of each microbatch costs, in sum, over what ranks cost in the
    mean: 1 where nobody waits. ZeroDivisionError where nothing costs anything."""
    dearest = 0
    for shares in zip(*dealt, strict=True):
        dearest += max(sum(costs[p] for p in share if p < len(costs)) for share in shares)
    return dearest * len(dealt) / sum(costs)


def _neighbours(block: Places, size: int) -> list[Places]:
    return [block[first : first + size] for first in range(0, len(block), size)]


def _least_first(block: Places, costs: Sequence[int], ranks: int, size: int) -> list[Places]:
    shares: list[Places] = [[] for _ in range(ranks)]
    open_ranks = [(0, rank) for rank in range(ranks)]
    for place in block:
        held, rank = heapq.heappop(open_ranks)
        shares[rank].append(place)
        if len(shares[rank]) < size:
            cost = costs[place] if place < len(costs) else 0
            heapq.heappush(open_ranks, (held + cost, rank))
    return [sorted(share) for share in shares]
