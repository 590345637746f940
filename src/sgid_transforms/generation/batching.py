"""Run work in batches that shrink when memory runs out, and in which one bad item does not fail the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from sgid_transforms.errors import GenerationError

Item = TypeVar("Item")
Result = TypeVar("Result")

# What CUDA, ROCm, XPU, MPS and NPU say when there is no memory left, also in libraries that cannot make their workspace.
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "alloc_failed",
    "cublas_status_not_initialized",
    "unable to find an engine",
    "out_of_device_memory",
    "out_of_host_memory",
    "invalid buffer size",
)
# What they say when a kernel failed in a way after which every call in this process fails.
_LOST = (
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "invalid program counter",
    "device-side assert",
    "unspecified launch failure",
    "launch timed out",
    "hardware stack error",
    "uncorrectable ecc",
    "error: unknown error",
    "device_lost",
    "device lost",
    "aicore",
)


class BatchLimit:
    """How much one batch may hold, ``value``; lowered for good when memory runs out."""

    def __init__(self, value: int) -> None:
        self.value = value

    def halve(self, failed: int) -> None:
        """Lower the limit to half of the size that failed."""
        self.value = max(failed // 2, 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device, or the host, ran out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)


def is_device_lost(error: BaseException) -> bool:
    """Whether an exception says that the device cannot be used any more, which concerns all requests."""
    said = str(error).lower()
    return isinstance(error, RuntimeError) and not is_out_of_memory(error) and any(sign in said for sign in _LOST)


def run_isolated(
    work: Callable[[list[Item]], Sequence[Result]],
    items: Sequence[Item],
    limit: BatchLimit,
    cost: Callable[[Item], int] = lambda _: 1,
) -> list[Result | Exception]:
    """Run ``work`` over ``items`` in batches; one result, or one exception, for each item, in order.

    A batch that runs out of memory is halved, and so are all later ones; a batch that fails for another reason is split until
    the failing items are alone. ``work`` must therefore have no side effects before it succeeds.

    Args:
        work: takes a list of items and returns one result for each.
        items: what to work on.
        limit: the largest total cost of a batch; a single item is always tried, whatever it costs.
        cost: an item's share of the limit.

    Raises:
        RuntimeError: the device is lost.
    """
    results: dict[int, Result | Exception] = {}
    pending = [list(range(len(items)))]
    while pending:
        group = pending.pop()
        head = _fitting([cost(items[i]) for i in group], limit.value)
        if head < len(group):
            pending.append(group[head:])
            group = group[:head]
        if not group:
            continue
        failure: Exception | None = None
        try:
            outcome = work([items[i] for i in group])
        except Exception as error:
            if is_device_lost(error):
                raise
            failure = error
        if failure is None:
            results.update(zip(group, outcome, strict=True))
            continue
        memory = is_out_of_memory(failure)
        if memory:
            # The traceback would keep the failed batch's tensors alive while a smaller one is tried.
            failure = failure.with_traceback(None)
            failure.__context__ = None
            _release_memory()
        if len(group) > 1:
            if memory:
                limit.halve(sum(cost(items[i]) for i in group))
                pending.append(group)
            else:
                pending += [group[len(group) // 2 :], group[: len(group) // 2]]
        elif memory:
            alone = GenerationError(f"out of memory at a batch of one ({failure}); lower the resolution or use a smaller dtype")
            alone.__cause__ = failure
            results[group[0]] = alone
        else:
            results[group[0]] = failure
    return [results[i] for i in range(len(items))]


def longest_first(remaining: Sequence[int], costs: Sequence[int], limit: int) -> list[int]:
    """Indices of the samples that take part in the next step: those with the most steps left, as many as fit.

    Serving the longest first keeps batches full to the end. The number of batches is then minimal: the larger of the longest
    sample's steps and the total divided by the batch size (McNaughton 1959).

    Args:
        remaining: steps left for each sample.
        costs: rows that each sample takes in the next step.
        limit: rows in a batch; one sample is always chosen.
    """
    order = sorted(range(len(remaining)), key=lambda i: -remaining[i])
    chosen: list[int] = []
    used = 0
    for i in order:
        if used + costs[i] <= limit or not chosen:
            chosen.append(i)
            used += costs[i]
        if used >= limit:
            break
    return chosen


def _fitting(costs: Sequence[int], limit: int) -> int:
    """How many of the first items fit the limit together; at least one, if there is any."""
    used = 0
    for count, cost in enumerate(costs):
        used += cost
        if used > limit and count:
            return count
    return len(costs)


def _release_memory() -> None:
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        torch.get_device_module(device).empty_cache()
