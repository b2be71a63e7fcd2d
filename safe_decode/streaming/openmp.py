"""The worker threads that torch keeps for whoever computed in parallel before.

Knows OpenMP's pools. Does not know models. libgomp keeps a pool of workers for each thread that
has computed, and lets them wait busily only while there are no more of them than processors.
Workers of a thread that computes no more count too: a model that runs in a second thread then
pays a system call at each parallel region, on two cores three times the time of a token.
"""

from __future__ import annotations

import ctypes

import torch

__all__ = ["release_workers"]

_SOFT = 1
"""omp_pause_soft: settings stay (OpenMP 5.0, section 3.2.44)."""


def release_workers() -> bool:
    """Let the calling thread's workers end, before another thread computes.

    They come back, within a fraction of a millisecond, when the calling thread computes in
    parallel again. Nothing else changes.

    Returns:
        Whether the OpenMP that torch was built with could be asked, and did so.
    """
    try:
        # Looked up through torch, so that it is torch's own OpenMP and no other.
        pause = ctypes.CDLL(torch._C.__file__).omp_pause_resource_all
    except (AttributeError, OSError):  # built without OpenMP, or with one before 5.0
        return False
    return bool(pause(_SOFT) == 0)
