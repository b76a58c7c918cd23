"""Evolutionary search among the paths of a trained supernet."""

import random
from collections.abc import Callable, Hashable
from typing import TypeVar

Path = TypeVar("Path", bound=Hashable)


def evolve(
    draw: Callable[[random.Random], Path],
    mutate: Callable[[Path, random.Random], Path],
    cross: Callable[[Path, Path, random.Random], Path],
    score: Callable[[Path], float | tuple[float, ...]],
    legal: Callable[[Path], bool],
    *,
    scored: int = 200,
    population: int = 50,
    parents: int = 10,
    seed: int = 0,
) -> dict[Path, float | tuple[float, ...]]:
    """Paths with their scores, the best one first; `scored` of them at most, each scored once.

    A generation has `population` paths: half mutations of one of the best `parents` seen so far, half crossings of two
    of them, and what is lacking drawn at random, as the first generation is. A path that is not legal is drawn anew,
    ten times as often as paths are wanted; when a generation so brings nothing new, the search ends before `scored`.

    As in the authors' code of NOAH and of GLoRA, both after Single Path One-Shot (https://arxiv.org/abs/1904.00420).
    """
    rng, found = random.Random(seed), dict[Path, float | tuple[float, ...]]()
    best: list[Path] = []

    def add(make: Callable[[], Path], count: int) -> None:
        tries, wanted = 10 * count, min(len(found) + count, scored)
        while len(found) < wanted and tries:
            tries -= 1
            path = make()
            if path not in found and legal(path):
                found[path] = score(path)

    while len(found) < scored:
        before = len(found)
        if best:
            add(lambda: mutate(rng.choice(best), rng), population // 2)
            add(lambda: cross(rng.choice(best), rng.choice(best), rng), population // 2)
        add(lambda: draw(rng), population - (len(found) - before))
        if len(found) == before:
            break
        best[:] = sorted(found, key=found.__getitem__, reverse=True)[:parents]
    return dict(sorted(found.items(), key=lambda item: item[1], reverse=True))
