import re
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgid_transforms.errors import GenerationError
from sgid_transforms.generation.batching import BatchLimit, is_device_lost, is_out_of_memory, longest_first, run_isolated


def square(items: list[int]) -> list[int]:
    return [item * item for item in items]


def failing(bad: set[int], sizes: list[int] | None = None) -> Callable[[list[int]], list[int]]:
    def work(items: list[int]) -> list[int]:
        if sizes is not None:
            sizes.append(len(items))
        if bad & set(items):
            raise ValueError(f"cannot take {sorted(bad & set(items))}")
        return square(items)

    return work


@given(st.lists(st.integers(1, 3), max_size=30), st.integers(1, 8))
def test_batches_keep_order_and_limit(costs: list[int], limit: int) -> None:
    seen: list[list[int]] = []

    def work(items: list[int]) -> list[int]:
        seen.append(items)
        return square(items)

    results = run_isolated(work, range(len(costs)), BatchLimit(limit), cost=lambda i: costs[i])
    assert results == square(list(range(len(costs))))
    assert [i for items in seen for i in items] == list(range(len(costs)))
    assert all(sum(costs[i] for i in items) <= limit or len(items) == 1 for items in seen)


@given(st.sets(st.integers(0, 19), max_size=4))
def test_only_the_bad_items_fail(bad: set[int]) -> None:
    results = run_isolated(failing(bad), range(20), BatchLimit(20))
    for i, result in enumerate(results):
        if i in bad:
            assert isinstance(result, ValueError)
            assert str(result) == f"cannot take [{i}]"
        else:
            assert result == i * i


def test_a_bad_item_does_not_lower_the_limit() -> None:
    limit, sizes = BatchLimit(8), list[int]()
    run_isolated(failing({1}, sizes), range(16), limit)
    assert limit.value == 8
    assert sizes[-1] == 8


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "cublas", "host"],
)
def test_memory_halves_the_batch_and_is_remembered(error: Exception) -> None:
    limit, sizes = BatchLimit(16), list[int]()

    def work(items: list[int]) -> list[int]:
        sizes.append(len(items))
        if len(items) > 5:
            raise error
        return square(items)

    assert run_isolated(work, range(20), limit) == square(list(range(20)))
    assert (limit.value, sizes[:3]) == (4, [16, 8, 4])
    sizes.clear()
    run_isolated(work, range(20), limit)
    assert sizes == [4] * 5


def test_memory_that_does_not_do_for_one() -> None:
    def work(items: Sequence[int]) -> list[int]:
        if 3 in items:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return square(list(items))

    results = run_isolated(work, range(6), BatchLimit(4))
    assert isinstance(results[3], GenerationError)
    assert str(results[3]).startswith("out of memory at a batch of one (CUDA out of memory); lower the resolution")
    assert [r for i, r in enumerate(results) if i != 3] == [0, 1, 4, 16, 25]


def test_interrupts_are_not_swallowed() -> None:
    def work(items: list[int]) -> list[int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_isolated(work, range(3), BatchLimit(2))


def test_ordinary_errors_are_not_memory_errors() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(1, 16))
def test_longest_first_takes_the_fewest_batches(steps: list[int], limit: int) -> None:
    remaining, batches = list(steps), 0
    while any(remaining):
        alive = [i for i, left in enumerate(remaining) if left]
        chosen = longest_first([remaining[i] for i in alive], [1] * len(alive), limit)
        assert len(chosen) == min(limit, len(alive))
        for i in chosen:
            remaining[alive[i]] -= 1
        batches += 1
    assert batches == max(max(steps), -(-sum(steps) // limit))


def test_rows_left_over_go_to_a_sample_that_fits() -> None:
    assert longest_first([9, 8, 7, 6], [2, 2, 2, 1], 5) == [0, 1, 3]
    assert longest_first([3], [2], 1) == [0]


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "GET was unable to find an engine to execute this computation",
        "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
        "Invalid buffer size: 24.00 GiB",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
    ],
)
def test_every_vendors_lack_of_memory_is_known(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))
    assert not is_device_lost(RuntimeError(message))


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported", True),
        ("CUDA error: device-side assert triggered", True),
        ("HIP error: unspecified launch failure", True),
        ("level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)", True),
        ("CUDA error: invalid configuration argument", False),  # of one batch
        ("CUDA error: no kernel image is available for execution on the device", False),  # a new process would not help
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_a_lost_device_is_told_from_other_errors(message: str, lost: bool) -> None:
    assert is_device_lost(RuntimeError(message)) is lost
    assert not is_device_lost(ValueError(message))
    limit = BatchLimit(8)

    def work(items: list[int]) -> list[int]:
        raise RuntimeError(message)

    if lost:
        with pytest.raises(RuntimeError, match=re.escape(message)):
            run_isolated(work, [1, 2, 3], limit)
    else:
        assert all(isinstance(result, RuntimeError) for result in run_isolated(work, [1, 2, 3], limit))
    assert limit.value == 8
