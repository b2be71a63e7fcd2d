"""Workers of a thread that computes no more are let go."""

import sys
import threading
from pathlib import Path

import pytest
import torch

from safe_decode.streaming.openmp import release_workers

N_THREADS = Path("/proc/self/task")


def compute():
    return torch.ones(1 << 20).mul(2.0).sum().item()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="torch without OpenMP")
def test_workers_end_and_come_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = compute()
        busy = len(list(N_THREADS.iterdir()))
        assert release_workers()
        for _ in range(100):  # they end by themselves, a little later
            if len(list(N_THREADS.iterdir())) < busy:
                break
            threading.Event().wait(0.01)
        assert len(list(N_THREADS.iterdir())) < busy
        assert compute() == expected
        assert len(list(N_THREADS.iterdir())) == busy
    finally:
        torch.set_num_threads(before)
