"""Names next to points without overlaps: candidates around each point, the cheapest free one is taken, the most important point chooses first."""

import math
from collections.abc import Sequence
from typing import NamedTuple

Box = tuple[float, float, float, float]  # left, bottom, right, top in pixels
ANGLES = tuple(math.radians(a) for a in (20, -20, 160, 200, 90, -90, 45, -45, 135, 225, 0, 180, 65, 115, -65, -115))
DISTANCES = (9.0, 15.0, 24.0, 36.0, 50.0, 68.0, 90.0)
LEADER = 20.0  # from this distance a line leads to the point
FREE = 400.0  # cost above which a place is not free


class Place(NamedTuple):
    """Where a label stands: its box, and the end of its leader line at the label, or None where it is near enough without one."""

    box: Box
    leader: tuple[float, float] | None


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    within: Box,
    hard: Sequence[Box],
    soft: Sequence[Box],
) -> list[Place | None]:
    """A place for the label of each point, in order of importance; None where no free one was found.

    sizes:  width and height of each label.
    within: where labels may stand.
    hard:   what a label must not cover (marks); other labels are added as they are placed.
    soft:   what it had better not cover (error bars, the frontier).
    """
    taken = list(hard)
    found: list[Place | None] = []
    for point, size in zip(points, sizes, strict=True):
        options = (_option(point, size, angle, distance) for distance in DISTANCES for angle in ANGLES)
        costs = [(_cost(option, point, within, taken, soft), order, option) for order, option in enumerate(options)]
        cost, _, best = min(costs)
        found.append(best if cost < FREE else None)
        if cost < FREE:
            taken.append(best.box)
    return found


def overlap(a: Box, b: Box) -> float:
    """Area that two boxes share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def segment(x0: float, y0: float, x1: float, y1: float, half: float = 1.0) -> Box:
    """An upright or level line as a thin box."""
    return min(x0, x1) - half, min(y0, y1) - half, max(x0, x1) + half, max(y0, y1) + half


def _option(point: tuple[float, float], size: tuple[float, float], angle: float, distance: float) -> Place:
    """The label whose nearest edge is at `distance` from the point, in direction `angle`."""
    (x, y), (width, height) = point, size
    dx, dy = math.cos(angle), math.sin(angle)
    ax, ay = x + dx * distance, y + dy * distance
    left = ax if dx > 0.3 else ax - width if dx < -0.3 else ax - width / 2
    bottom = ay if dy > 0.8 else ay - height if dy < -0.8 else ay - height / 2
    return Place((left, bottom, left + width, bottom + height), (ax, ay) if distance >= LEADER else None)


def _cost(option: Place, point: tuple[float, float], within: Box, taken: Sequence[Box], soft: Sequence[Box]) -> float:
    left, bottom, right, top = option.box
    outside = left < within[0] or bottom < within[1] or right > within[2] or top > within[3]
    if outside or any(overlap(option.box, other) for other in taken):
        return math.inf
    middle = ((left + right) / 2, (bottom + top) / 2)
    near = math.dist(point, (min(max(point[0], left), right), min(max(point[1], bottom), top)))
    cost = near + 0.02 * math.dist(point, middle)
    cost += sum(16 + 0.4 * overlap(option.box, other) for other in soft if overlap(option.box, other))
    if option.leader is not None:
        cost += 10 + 60 * sum(_crosses(point, option.leader, other) for other in taken)
    return cost


def _crosses(start: tuple[float, float], end: tuple[float, float], box: Box) -> bool:
    """Whether a leader line runs through a box; its own mark, at the start, does not count."""
    for step in range(3, 10):
        x = start[0] + (end[0] - start[0]) * step / 10
        y = start[1] + (end[1] - start[1]) * step / 10
        if box[0] <= x <= box[2] and box[1] <= y <= box[3]:
            own = box[0] <= start[0] <= box[2] and box[1] <= start[1] <= box[3]
            return not own
    return False
