"""Which example belongs to which split: decided by the example's own name, never by the order it was found in."""

from collections import defaultdict
from collections.abc import Sequence
from hashlib import sha256


def stratified_split(
    names: Sequence[str], labels: Sequence[int], fractions: Sequence[float], seed: int = 0
) -> list[list[int]]:
    """Cut every class in the same proportions.

    Within a class the examples are ranked by a hash of the seed and their name. So the split is the same on every
    machine and file system, and a file added later moves only those at a boundary.

    Args:
        names: One unique name an example.
        labels: The class of each example; as long as `names`.
        fractions: The share of each part, in [0, 1); what they leave is the remainder. A class always keeps one
            example in the remainder.
        seed: Another seed, another split.

    Returns:
        Indices into `names`, each list sorted: one list a fraction, then the remainder.

    Raises:
        ValueError: When a fraction is outside [0, 1) or they leave nothing.
    """
    if any(not 0 <= fraction < 1 for fraction in fractions) or sum(fractions) >= 1:
        raise ValueError(f"fractions {list(fractions)}: each must lie in [0, 1) and together leave a training set")
    of_class: defaultdict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        of_class[label].append(index)
    parts: list[list[int]] = [[] for _ in range(len(fractions) + 1)]
    for members in of_class.values():
        ranked = sorted(members, key=lambda i: sha256(f"{seed}:{names[i]}".encode()).digest())
        start = 0
        for part, fraction in zip(parts, fractions, strict=False):
            stop = min(start + round(fraction * len(ranked)), len(ranked) - 1)
            part.extend(ranked[start:stop])
            start = stop
        parts[-1].extend(ranked[start:])
    return [sorted(part) for part in parts]
