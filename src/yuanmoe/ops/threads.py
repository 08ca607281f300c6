"""How many threads torch and the compiled kernels compute with."""

import torch

from yuanmoe.plan.device.machine import usable_cores


def use_threads(threads: int | None = None) -> int:
    """Computes with so many threads from now on, and returns how many.

    By default as many as torch chose, but not more than the cores that this process may use: torch knows nothing of the
    quota of a container, and threads that are not paid for are stopped together.
    """
    count = threads or min(torch.get_num_threads(), usable_cores())
    torch.set_num_threads(count)
    return count
