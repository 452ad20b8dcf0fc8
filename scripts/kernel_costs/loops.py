"""The loops of a kernel in machine code: how they nest, and what one turn of each issues."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kernel_costs.machine_code import Block


@dataclass
class Loop:
    """A natural loop.

    Attributes:
        head: the block that every turn begins with.
        body: its blocks, those of inner loops as well.
        children: the loops directly inside it, by their heads.
    """

    head: int
    body: frozenset[int]
    children: dict[int, Loop] = field(default_factory=dict)

    @property
    def own(self) -> frozenset[int]:
        """The blocks that are in no inner loop."""
        return self.body.difference(*(child.body for child in self.children.values()))

    def nest(self) -> Iterator[Loop]:
        """This loop and all inside it."""
        yield self
        for child in self.children.values():
            yield from child.nest()


def loop_nest(blocks: Sequence[Block]) -> list[Loop]:
    """The outermost loops of a kernel, in the order of their heads."""
    bodies: dict[int, set[int]] = {}
    before: list[list[int]] = [[] for _ in blocks]
    for index, block in enumerate(blocks):
        for following in block.following:
            before[following].append(index)
    dominators = _dominators(blocks, before)
    for index, block in enumerate(blocks):
        for head in block.following:
            if head not in dominators.get(index, ()):
                continue
            body, ways = bodies.setdefault(head, {head}), [index]
            while ways:
                at = ways.pop()
                if at not in body:
                    body.add(at)
                    ways += [b for b in before[at] if b in dominators]
    roots: list[Loop] = []
    # A loop comes before those inside it.
    for head, body in sorted(bodies.items(), key=lambda item: (-len(item[1]), item[0])):
        loop, place = Loop(head, frozenset(body)), roots
        around = next((root for root in roots if head in root.body), None)
        while around is not None:
            inner = next((c for c in around.children.values() if head in c.body), None)
            if inner is None:
                around.children[head] = loop
                break
            around = inner
        else:
            place.append(loop)
    return sorted(roots, key=lambda loop: loop.head)


def _dominators(blocks: Sequence[Block], before: list[list[int]]) -> dict[int, set[int]]:
    """The blocks that every way to a block from the first one passes, for those that have a way."""
    reached, ways = {0}, [0]
    while ways:
        for following in blocks[ways.pop()].following:
            if following not in reached:
                reached.add(following)
                ways.append(following)
    order = sorted(reached)
    found = {index: set(order) for index in order}
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for index in order[1:]:
            common = set.intersection(*(found[b] for b in before[index] if b in reached))
            if (common := common | {index}) != found[index]:
                found[index], changed = common, True
    return found


def turn(
    blocks: Sequence[Block],
    loop: Loop,
    required: Callable[[Block], bool],
    entered: Callable[[Loop], bool],
) -> list[int]:
    """The blocks of a loop's own that its cheapest turn runs through.

    Args:
        blocks: of the kernel.
        loop: one of its loops.
        required: whether a turn has to pass a block. Of blocks that exclude each other it passes
            the first.
        entered: whether it has to enter an inner loop.
    """
    home = {index: child for child in loop.children.values() for index in child.body}
    own = loop.own

    def exits(place: int) -> set[int]:
        """Where a block, or an inner loop named by its head, leads within this loop."""
        child = loop.children.get(place)
        inside = child.body if child else {place}
        return {
            home[f].head if f in home else f
            for index in inside
            for f in blocks[index].following
            if f in loop.body and f not in (inside if child else ())
        }

    def way(start: int, end: int) -> list[int] | None:
        """The cheapest way from one place to another, without the first; not through the head."""
        best: dict[int, float] = {}
        queue: list[tuple[float, int, tuple[int, ...]]] = [(0.0, start, ())]
        while queue:
            cost, place, path = heapq.heappop(queue)
            if place == end and path:
                return list(path)
            if (place == loop.head and path) or best.get(place, cost + 1) <= cost:
                continue
            if path:
                best[place] = cost
            for following in exits(place):
                # Inner loops that need not be entered are a way of last resort.
                weight = len(blocks[following].instructions) if following in own else 1e4
                heapq.heappush(queue, (cost + weight, following, (*path, following)))
        return None

    stops = [index for index in own if index != loop.head and required(blocks[index])]
    stops += [child.head for child in loop.children.values() if entered(child)]
    passed, at = [loop.head], loop.head
    for stop in sorted(stops):
        if stop not in passed and (path := way(at, stop)):
            passed += path
            at = stop
    passed += way(at, loop.head) or []
    # The head ends the turn that it has begun.
    return [index for index in dict.fromkeys(passed) if index in own]


def operations(blocks: Sequence[Block], indices: Sequence[int] | frozenset[int]) -> Counter[str]:
    """How often each operation is there, by its name without what modifies it."""
    return Counter(
        instruction.split(maxsplit=1)[0].split(".")[0]
        for index in indices
        for instruction in blocks[index].instructions
    )
