"""Several processes on one recovery, started by `torchrun`; everything works alike in a single one.

Candidates are scored by one process each; recovery splits every batch. All communication is
`torch.distributed`'s, whose object collectives pickle: they run between the processes of this one run only, never on
anything read from outside. Every process must make the same calls in the same order; each raises a
`DistributedError` where another process ended.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxprune.errors import DistributedError, FxpruneError
from fxprune.graph.call import Inputs

__all__ = [
    "ensure_group",
    "is_main",
    "leave_group",
    "main_first",
    "on_main",
    "rank",
    "same_everywhere",
    "share_buffers",
    "share_of",
    "share_out",
    "sum_gradients",
    "sum_over_ranks",
    "world_size",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, from 0; 0 without a group."""
    return dist.get_rank() if _grouped() else 0


def world_size() -> int:
    """How many processes work together; 1 without a group."""
    return dist.get_world_size() if _grouped() else 1


def is_main() -> bool:
    """Whether this is the process that talks to the user and writes the results."""
    return rank() == 0


def ensure_group(timeout_s: float = 3600.0) -> bool:
    """Joins the other processes where `torchrun` started this one (`RANK` and `WORLD_SIZE` are set).

    Objects travel by gloo, so that a dead process is noticed at once; gradients on CUDA travel by NCCL where every
    local process has a GPU of its own, which becomes its current device.

    Args:
        timeout_s: How long to wait for the others in any one step; the slowest candidate must be fitted within.

    Returns:
        Whether there are several processes.

    Raises:
        DistributedError: The others did not come, or torch was built without distributed support.
    """
    if _grouped() or not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return world_size() > 1
    if not dist.is_available():
        raise DistributedError(
            "RANK and WORLD_SIZE are set, but this torch was built without torch.distributed: install another build, "
            "or start a single process without torchrun"
        )
    backend = "gloo"
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local % torch.cuda.device_count())
        alone = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()
        backend = "cpu:gloo,cuda:nccl" if alone and dist.is_nccl_available() else "gloo"
    with _as_distributed_error("meeting the other processes"):
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    logger.info("process %d of %d, %s", rank(), world_size(), backend)
    return world_size() > 1


def leave_group() -> None:
    """Ends the default group, if there is one; for the end of a program, not of a function in somebody else's."""
    if _grouped():
        dist.destroy_process_group()


@contextmanager
def _as_distributed_error(what: str) -> Iterator[None]:
    """Turns torch's errors about lost connections into ours."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        number, world = os.environ.get("RANK", rank()), os.environ.get("WORLD_SIZE", world_size())
        gist = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DistributedError(
            f"process {number} of {world} lost the others while {what}: one of them ended or did not answer in time "
            f"({gist}). Its own output says why. Scores that were finished are kept where a folder was "
            "given; run the same command again to go on from there"
        ) from error


def same_everywhere(obj: T) -> T:
    """Rank 0's object, on every rank. It is pickled on the way, tensors should be on the CPU."""
    return on_main(lambda: obj)


def on_main(compute: Callable[[], T]) -> T:
    """What `compute` returns on rank 0, on every rank; the others wait, so that what is timed is timed undisturbed.

    Raises:
        DistributedError: On the others, `compute` failed on rank 0.
    """
    if world_size() == 1:
        return compute()
    (result, failure), *_ = _gather(compute if is_main() else lambda: None, "sharing what rank 0 found")
    if failure is not None:
        raise DistributedError(f"rank 0 failed, so rank {rank()} ends too: {failure}")
    return result  # type: ignore[no-any-return]  # rank 0 put a T in


def main_first(make: Callable[[], T]) -> T:
    """What `make` returns, made by every rank, but by rank 0 before the others begin: for folders and the like.

    Raises:
        DistributedError: On the others, `make` failed on rank 0.
    """
    made: list[T] = []
    on_main(lambda: made.append(make()))
    return made[0] if made else make()


def share_out(
    work: Sequence[Callable[[], T]], run: Callable[[Sequence[Callable[[], T]]], list[T]]
) -> list[T]:
    """The results of some calls that score, each made by one process: rank r makes `work[r::world]`.

    Args:
        work: The same list on every rank. Results travel between processes: tensors should be on the CPU.
        run: Makes this process's calls, in order.

    Returns:
        One result for each call, in their order and the same on every rank.

    Raises:
        DistributedError: On the others, one of its calls failed.
    """
    world = world_size()
    if world == 1:
        return run(work)
    gathered = _gather(lambda: run(work[rank() :: world]), "gathering scores")
    failures = [f"rank {r}: {failure}" for r, (_, failure) in enumerate(gathered) if failure is not None]
    if failures:
        raise DistributedError(f"scoring failed elsewhere, so rank {rank()} ends too: {'; '.join(failures)}")
    return [gathered[i % world][0][i // world] for i in range(len(work))]


def _gather(compute: Callable[[], Any], doing: str) -> list[tuple[Any, str | None]]:
    """Every rank's result, or why it has none; an error of this rank's own is raised once the others know of it."""
    result, failed, failure = None, None, None
    try:
        result = compute()
    except DistributedError:
        raise  # nobody is left to be told
    except Exception as error:
        failed = error
        failure = str(error) if isinstance(error, FxpruneError) else f"{type(error).__name__}: {error}"
    gathered: list[Any] = [None] * world_size()
    with _as_distributed_error(doing):
        dist.all_gather_object(gathered, (result, failure))
    if failed is not None:
        raise failed
    return gathered


def share_of(batch: Inputs) -> tuple[Inputs, float]:
    """This process's images of a batch that every rank drew alike, and their weight: their part of the batch.

    A process for which none is left works on the first image with weight 0, so that all take the same steps.
    """
    count, world = batch.batch_size, world_size()
    start, stop = (r * count // world for r in (rank(), rank() + 1))
    weight = (stop - start) / count
    rows = slice(start, stop) if stop > start else slice(0, 1)
    return batch.map(lambda tensor: tensor[rows]), weight


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a detached value over all ranks, on every rank."""
    summed = value.detach().clone()
    if world_size() > 1:
        with _as_distributed_error("adding losses"):
            dist.all_reduce(summed)
    return summed


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replaces gradients of weighted losses (see `share_of`) by their sum over all ranks: those of the whole batch."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if world_size() == 1 or not gradients:
        return
    flat = torch.cat([g.reshape(-1) for g in gradients])  # one message, and one rounding order on all ranks
    with _as_distributed_error("adding gradients"):
        dist.all_reduce(flat)
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def share_buffers(module: nn.Module) -> None:
    """Gives floating-point buffers their mean over all ranks: running statistics saw different images on each."""
    if world_size() == 1:
        return
    with _as_distributed_error("averaging running statistics"):
        for buffer in module.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer.div_(world_size())
