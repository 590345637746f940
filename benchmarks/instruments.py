"""What a benchmark measures with: seconds by stage, transfers, the device's idle share, its peak, and the work of a call.

Everything goes through PyTorch's interface for any accelerator, and works on a CPU as well.
"""

from __future__ import annotations

import functools
import resource
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

_PRODUCT_SECONDS = 0.5  # for the largest speed of a device to show


class Stopwatch:
    """Seconds by stage. On an accelerator, networks are timed by events, which do not make the device wait."""

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []
        self._open: dict[str, Any] = {}

    def synchronise(self) -> None:
        """Wait for what the device still has to do."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def watch(self, stage: str, module: torch.nn.Module) -> None:
        """Count the calls of a network to a stage."""
        module.register_forward_pre_hook(lambda *_: self._start(stage))
        module.register_forward_hook(lambda *_: self._stop(stage))

    @contextmanager
    def counting(self, stage: str) -> Iterator[None]:
        """Count what is done inside to a stage, by the clock."""
        self.synchronise()
        started = time.perf_counter()
        try:
            yield
        finally:
            self.synchronise()
            self._seconds[stage] += time.perf_counter() - started

    @contextmanager
    def counting_calls(self, stage: str, owner: Any, name: str) -> Iterator[None]:
        """Count all calls of a method to a stage, while inside."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.counting(stage):
                return original(*args, **kwargs)

        setattr(owner, name, counted)
        try:
            yield
        finally:
            setattr(owner, name, original)

    @contextmanager
    def counting_stream(self, stage: str, engine: Any) -> Iterator[None]:
        """Count to a stage what an engine's stream does between its answers, while inside."""
        original = engine.stream

        def counted(pull: Any) -> Iterator[Any]:
            answers = original(pull)
            while True:
                with self.counting(stage):
                    group = next(answers, None)
                if group is None:
                    return
                yield group

        engine.stream = counted
        try:
            yield
        finally:
            del engine.stream

    def take(self) -> dict[str, float]:
        """Seconds of each stage since the last call."""
        self.synchronise()
        for stage, start, stop in self._events:
            self._seconds[stage] += start.elapsed_time(stop) / 1000
        taken = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return taken

    def _start(self, stage: str) -> None:
        self._open[stage] = self._mark()

    def _stop(self, stage: str) -> None:
        start = self._open.pop(stage)
        if self.device.type == "cpu":
            self._seconds[stage] += self._mark() - start
        else:
            self._events.append((stage, start, self._mark()))

    def _mark(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self.device))
        return event


class Copies(TorchDispatchMode):
    """Counts the transfers between CPU and devices while it is entered: ``there`` and ``back``."""

    def __init__(self) -> None:
        super().__init__()
        self.there = self.back = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source, target = (args[1], args[0]) if packet is torch.ops.aten.copy_ else (args[0], made)
            self.there += source.device.type == "cpu" != target.device.type
            self.back += target.device.type == "cpu" != source.device.type
        return made


def flops(work: Callable[[], object]) -> int:
    """Floating-point operations of a call, by the shapes in it; a multiplication with its addition counts two."""
    # Attention in its parts, for which there are formulas on every device.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return int(counter.get_total_flops())


def peak_flops(device: str | torch.device, dtype: torch.dtype, side: int | None = None) -> float:
    """Floating-point operations per second of products of two matrices, the fastest of those made in half a second.

    Args:
        device: where to multiply.
        dtype: of the matrices.
        side: their height and width; None: 8192 on an accelerator, 1024 on a CPU.
    """
    watch = Stopwatch(device)
    side = side or (1024 if watch.device.type == "cpu" else 8192)
    one, other = (torch.full((side, side), 0.5).to(watch.device, dtype) for _ in range(2))
    best, stop = float("inf"), time.perf_counter() + _PRODUCT_SECONDS
    torch.mm(one, other)
    watch.synchronise()
    while time.perf_counter() < stop or best == float("inf"):
        started = time.perf_counter()
        for _ in range(4):
            torch.mm(one, other)
        watch.synchronise()
        best = min(best, (time.perf_counter() - started) / 4)
    return 2 * side**3 / best


def idle_share(work: Callable[[], object], device: str | torch.device) -> float | None:
    """Share of the time of a call in which the device ran nothing; None where PyTorch's profiler does not see the device."""
    device = torch.device(device)
    activity = getattr(torch.profiler.ProfilerActivity, device.type.upper(), None)
    if device.type == "cpu" or activity not in torch.profiler.supported_activities():
        return None
    watch = Stopwatch(device)
    watch.synchronise()
    with torch.profiler.profile(activities=[activity]) as profile:
        started = time.perf_counter()
        work()
        watch.synchronise()
        seconds = time.perf_counter() - started
    spans = [(e.time_range.start, e.time_range.end) for e in profile.events() if e.device_type != torch.autograd.DeviceType.CPU]
    return max(0.0, 1 - covered(spans) / 1e6 / seconds) if spans else None


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def reset_peak_memory(device: str | torch.device) -> None:
    """Forget the most that the device held; a process's own maximum cannot be forgotten."""
    reset = getattr(torch.get_device_module(device), "reset_peak_memory_stats", None)
    if torch.device(device).type != "cpu" and reset is not None:
        reset()


def peak_memory(device: str | torch.device) -> float:
    """MiB: the most that the device held since the last reset; on a CPU, the most that this process ever had."""
    most = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    if torch.device(device).type != "cpu" and most is not None:
        return float(most()) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def device_name(device: str | torch.device) -> str:
    """The device's name with its driver, as far as it tells."""
    device = torch.device(device)
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    named = getattr(torch.get_device_module(device), "get_device_name", None)
    name = named() if named is not None else device.type
    return f"{name}, {driver}" if (driver := _driver(device)) else name


def _driver(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.cuda is None:
        return f"ROCm {torch.version.hip}" if device.type == "cuda" else ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        version = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        version = "unknown"
    return f"driver {version.strip()}, CUDA {torch.version.cuda}"
