"""Transactions that collide with others (a deadlock, the same id placed twice) are run again from their start."""

#: How often a transaction may collide before it is given up.
COLLISIONS_MAX = 10


def pause_after(collisions: int, random: float) -> float:
    """Return seconds to wait after so many collisions (>= 1); `random` is uniform in [0, 1)."""
    ceiling: float = min(0.1, 0.002 * 2**collisions)
    return ceiling * random
