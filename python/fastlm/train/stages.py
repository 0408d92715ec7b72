"""Which stage of a pipeline has which blocks, and in which order a rank works through micro-batches.

With one stage a rank: one forward, one backward (1F1B, Narayanan et al. 2019), with at most as many micro-batches in flight
as there are ranks behind. With several, rank r of R holds the stages r, r + R, r + 2R ...: micro-batches go round several
times, and while the pipeline fills and empties a rank waits for shorter stages (interleaved 1F1B, Narayanan et al. 2021).
"""

from __future__ import annotations

from collections.abc import Iterator


def stage_of(layer: int, layers: int, stages: int) -> int:
    """Which stage has a block."""
    return layer * stages // layers


def _rounds(ranks: int, micros: int) -> list[range]:
    """Micro-batches that pass through one stage after the other of a rank together: as many as there are ranks, or more."""
    count = max(micros // ranks, 1)
    sizes = [micros // count + (i < micros % count) for i in range(count)]
    return [range(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(count)]


def ahead(rank: int, ranks: int, each: int, micros: int) -> int:
    """Forwards that a rank with `each` stages makes before its first backward; one more is in flight at most."""
    if each == 1:
        return min(ranks - 1 - rank, micros)
    return min((each - 1) * len(_rounds(ranks, micros)[0]) + 2 * (ranks - 1 - rank), each * micros)


def schedule(rank: int, ranks: int, each: int, micros: int) -> Iterator[tuple[str, int, int]]:
    """("forward" | "backward", number of the micro-batch, which of the rank's `each` stages) in the order of a step."""
    rounds, first = _rounds(ranks, micros), ahead(rank, ranks, each, micros)
    forwards = [(i, k) for micro in rounds for k in range(each) for i in micro]
    backwards = [(i, k) for micro in rounds for k in reversed(range(each)) for i in micro]
    for step in range(each * micros + first):
        if step < each * micros:
            yield "forward", *forwards[step]
        if step >= first:
            yield "backward", *backwards[step - first]


def idle(ranks: int, each: int, micros: int) -> float:
    """The part of a step in which a rank waits, were all stages and micro-batches alike and transfers for nothing.

    A micro-batch takes a rank one unit of time, a stage 1/each of it.
    """
    return 1 - micros / (max(micros, ranks) + (min(micros, ranks) - 1) / each)
