"""What glibc does with freed memory: by default it gives large blocks back to the kernel at once.

A network frees and allocates the same megabytes at every layer, and each time the kernel has to
find and clear the pages again; with the demo's UNet that was a twelfth of all its time.
"""

from __future__ import annotations

import ctypes

# Parameters of mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Let this process keep what it frees, for its own later use; nothing without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(M_MMAP_THRESHOLD, 2**30)
    mallopt(M_TRIM_THRESHOLD, 2**30)
    mallopt(M_TOP_PAD, 2**26)
