"""Which examples form which batch: pure functions of lengths, seed and epoch, so that a run can go on from any step."""

from collections.abc import Iterator, Sequence

import numpy as np

MEGA = 50  # batches among which examples of similar length are sought


class Plan:
    """The batches of a run.

    lengths  of the examples, in tokens
    size     examples in a batch
    grouped  put examples of similar length together: shuffled, sorted within runs of MEGA batches, batches shuffled
    seed     of the order; it has nothing to do with torch's generators, so that dropout and order are independent
    """

    def __init__(self, lengths: Sequence[int], size: int, *, seed: int = 0, grouped: bool = True):
        self.lengths, self.size, self.seed = np.asarray(lengths), size, seed
        self.grouped = grouped and len(set(lengths)) > 1

    def epoch(self, number: int) -> list[list[int]]:
        """The batches of one epoch, as positions of examples; the last one may be smaller."""
        rng = np.random.default_rng((self.seed, number))
        order = rng.permutation(len(self.lengths))
        if not self.grouped:
            return [order[i : i + self.size].tolist() for i in range(0, len(order), self.size)]
        batches = []
        for start in range(0, len(order), MEGA * self.size):
            run = order[start : start + MEGA * self.size]
            run = run[np.argsort(-self.lengths[run], kind="stable")]
            batches += [run[i : i + self.size].tolist() for i in range(0, len(run), self.size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def steps(self, accumulation: int, processes: int = 1) -> int:
        """Optimizer steps of one epoch."""
        batches = -(-len(self.lengths) // self.size)
        return -(-batches // (accumulation * processes))

    def stream(self, start: int, accumulation: int, process: int = 0, processes: int = 1) -> Iterator[list[list[int]]]:
        """From optimizer step `start` on, without end: the batches of each step that fall to `process`.

        A step takes accumulation * processes batches, the last one of an epoch what is left; where that does not divide
        among the processes, batches from the beginning of the epoch fill up, since every process has to take part.
        """
        each, per_epoch = accumulation * processes, self.steps(accumulation, processes)
        number, first = divmod(start, per_epoch)
        while True:
            batches = self.epoch(number)
            missing = -len(batches) % processes
            batches += [batches[i % len(batches)] for i in range(missing)]
            for i in range(first, per_epoch):
                yield batches[i * each : (i + 1) * each][process::processes]
            number, first = number + 1, 0


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of at most `capacity` tokens, as positions: best fit, longest first. Every length must be <= capacity.

    At most 11/9 of the fewest bins possible, and 6/9 of a bin more. Near-Optimal Bin Packing Algorithms. Johnson, 1973.
    """
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins with exactly so much room
    rooms = np.zeros(capacity + 1, dtype=bool)
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = lengths[i]
        fit = length + int(np.argmax(rooms[length:]))
        if rooms[fit]:
            chosen = by_room[fit].pop()
            rooms[fit] = bool(by_room[fit])
        else:
            fit, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(i)
        by_room[fit - length].append(chosen)
        rooms[fit - length] = True
    return bins
