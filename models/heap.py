"""Memory that was freed, given back to the system.

glibc's heap shrinks from its end alone: what was freed between blocks that live on stays with the process. Requests of
ever other sizes and kinds leave ever more of it, while what is in use stays the same.
"""

import ctypes
import os
from collections.abc import Callable

_LIBRARY = ctypes.CDLL(None) if os.name == "posix" else None
_trim: Callable[[int], int] | None = getattr(_LIBRARY, "malloc_trim", None)


def give_back() -> None:
    """Gives every free page back (malloc_trim(3)); where the C library knows no such thing, does nothing.

    Takes tens of milliseconds for a gigabyte, in which other threads may have to wait for memory.
    """
    if _trim is not None:
        _trim(0)
