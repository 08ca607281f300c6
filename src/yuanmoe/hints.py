"""What a message offers after a name that nobody knows: the likeliest one meant, or all there are.

Not here: the messages themselves, which belong to whoever refuses the name.
"""

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most like `name`; None where none is alike. `cutoff` is the least likeness, 0 to 1."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, known: Iterable[str], *, otherwise: str) -> str:
    """`did you mean X?`, or `otherwise` where no known name is alike."""
    close = closest(name, known)
    return otherwise if close is None else f"did you mean {close}?"
