"""Long looks at a recording, which several tasks may take at once, each some of them, before the plan is made.

In: functions of small arguments that read much. Out: what they return, from the task that has called them already.
"""

import contextlib
import hashlib
import pickle
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

from prep.plan import PrepError

FILMS, SPIKES = KINDS = ("films", "spikes")

Result = TypeVar("Result")


class LeftToOthers(PrepError):
    """Another task takes this look. Whoever asked for it goes on without: its plan is not used."""


@dataclass(kw_only=True)
class Looks:
    """What is known of a recording."""

    stamp: Any  # of its content: what was seen of another is not used
    left: frozenset[str] = frozenset()  # kinds of looks that other tasks take
    found: dict[bytes, Any] = field(default_factory=dict)


_LOOKS: ContextVar[Looks | None] = ContextVar("what other tasks have found, or will", default=None)


@contextlib.contextmanager
def knowing(looks: Looks) -> Iterator[None]:
    """While the block runs, what is found is kept in `looks`, and what is in there is not looked for again."""
    token = _LOOKS.set(looks)
    try:
        yield
    finally:
        _LOOKS.reset(token)


def only_look() -> str | None:
    """The one kind of look that this task takes for others, who do the rest; None where a plan is made."""
    looks = _LOOKS.get()
    own = [] if looks is None or not looks.left else [kind for kind in KINDS if kind not in looks.left]
    return own[0] if len(own) == 1 else None


def look(kind: str, function: Callable[..., Result], *args: Any) -> Result:
    """The result of function(*args), which reads nothing but one recording. Raises LeftToOthers where they take it."""
    looks = _LOOKS.get()
    if looks is None:
        return function(*args)
    key = hashlib.sha256(pickle.dumps((function.__qualname__, looks.stamp, args))).digest()
    if key not in looks.found:
        if kind in looks.left:
            raise LeftToOthers("another task looks at it")
        looks.found[key] = function(*args)
    result: Result = looks.found[key]
    return result
