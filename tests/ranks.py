"""Work on several processes that talk over gloo: what each rank found, or every rank's traceback, never a hang.

The work is a function that processes can import, so of a module of this folder (`sharded_work.py`), not of a test.
"""

import faulthandler
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SLOW_S = 60.0
"""Seconds after which ranks are taken to hang."""

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["torch.distributed", "small_models", "yuanmoe.train.steps.loop"])


def on_ranks(size: int, work: Callable[..., Any], *args: Any, slow_s: float = SLOW_S) -> list[Any]:
    """What `work(*args)` returns on each of `size` ranks of the default process group, one torch thread each.

    Raises AssertionError with the tracebacks of the ranks that failed, or that were still at work after `slow_s`.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        each = [(folder, rank, size, slow_s, work, args) for rank in range(size)]
        processes = [_processes.Process(target=_rank, args=told, daemon=True) for told in each]
        for process in processes:
            process.start()
        ends = time.monotonic() + slow_s + 10  # The ranks give up by themselves; this is for those that cannot.
        for process in processes:
            process.join(max(0.0, ends - time.monotonic()))
            process.kill()
            process.join()
        failed = [rank for rank, process in enumerate(processes) if process.exitcode]
        if failed:
            told = (f"rank {rank} ended with {processes[rank].exitcode}\n{_said(folder, rank)}" for rank in failed)
            raise AssertionError("\n".join(told))
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _said(folder: Path, rank: int) -> str:
    errors = folder / f"{rank}.txt"
    return errors.read_text() if errors.exists() else ""


def _rank(folder: Path, rank: int, size: int, slow_s: float, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with (folder / f"{rank}.txt").open("w") as errors:
        faulthandler.dump_traceback_later(slow_s, file=errors, exit=True)
        torch.set_num_threads(1)
        torch.manual_seed(0)
        meeting = f"file://{folder / 'meeting'}"
        try:
            dist.init_process_group("gloo", meeting, timedelta(seconds=slow_s), world_size=size, rank=rank)
            torch.save(work(*args), folder / f"{rank}.pt")
            dist.barrier()  # One that leaves early breaks the connections which others are still making to it.
            dist.destroy_process_group()
        except BaseException:
            traceback.print_exc(file=errors)
            raise SystemExit(1) from None
        finally:
            faulthandler.cancel_dump_traceback_later()
