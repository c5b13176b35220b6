"""Data-parallel training on CPU cores: one single-threaded process a core beats one process on all of them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def launch(worker: Callable[..., None], processes: int, *args: Any) -> None:
    """Run `worker(rank, processes, *args)` in `processes` processes joined by gloo (in this one if just one)."""
    if processes == 1:
        worker(0, 1, *args)
        return
    with socket.socket() as probe:  # a free port, so that two trainings never meet
        probe.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))
    torch.multiprocessing.spawn(_entry, (worker, processes, args), nprocs=processes)


def _entry(rank: int, worker: Callable[..., None], processes: int, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    try:
        worker(rank, processes, *args)
    finally:
        dist.destroy_process_group()


def average_gradients(parameters: Iterable[nn.Parameter], processes: int) -> None:
    """Replace each gradient by its mean over the processes."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if processes > 1:
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat)
        flat /= processes
        offset = 0
        for g in grads:
            g.copy_(flat[offset : offset + g.numel()].view_as(g))
            offset += g.numel()


def gather(x: torch.Tensor, rank: int, processes: int) -> torch.Tensor:
    """All processes' rows of `x`, stacked in rank order; gradients flow into the own rows only."""
    if processes == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(processes)]
    dist.all_gather(parts, x.detach().contiguous())
    parts[rank] = x
    return torch.cat(parts)
