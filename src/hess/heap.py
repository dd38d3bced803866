"""How the C library deals with memory that is freed, on Linux."""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 2**30
LARGEST_KEPT = 2**25
"""As large as the C library lets it become by itself."""


def keep_freed_memory() -> bool:
    """Let this process keep up to a GiB of freed memory for the tensors to come.

    The C library gives memory back to the system as soon as 64 MiB are free at the end of its
    heap, and what is taken anew has to be cleared page by page. Models free and take much more
    than that in every layer: in whole passes of a VGGT on two cores, a sixth of the time.

    For programs, not for libraries: it concerns all of the process. Environment variables of the
    C library about this (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``) have the last
    word. Tensors above 32 MiB are given back at once as before.

    Returns:
        Whether it is so now; only the C library of GNU knows how.
    """
    is_set = any(f"MALLOC_{name}_THRESHOLD_" in os.environ for name in ("TRIM", "MMAP"))
    mallopt = None if is_set or os.name == "nt" else getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Either one fixes the other, too, which would else stay at 128 KiB.
    return bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES) and mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT))
