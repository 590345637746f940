"""A pretended accelerator: real numbers on the CPU, in tensors that say they are on ``cuda:0`` or ``npu:0``.

    with PretendedDevice("cuda") as device:  # no GPU and no driver needed
        model.to("cuda")
        model(torch.randn(2, 3).to("cuda"))
    print(device.counts())

Every operator runs on the CPU copy inside the wrapper. What a real device would refuse is refused: a CPU tensor beside a device
tensor and, where there is none, float64. What costs a transfer or a wait is noted, with the line of the package that did it:

==========  ==========================================================================================
upload      CPU to device; it waits unless it is non-blocking from pinned memory
download    device to CPU; it waits unless it is non-blocking into pinned memory
item        a value that Python asks for (``item``, ``tolist``, ``bool``), or an index from a mask; it waits
event       the host waits for an event
==========  ==========================================================================================
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten

_INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)
_SIZE_FROM_VALUES = (aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive)
_active: PretendedDevice | None = None
_named = False


class Event(NamedTuple):
    """A transfer or a wait: its kind, whether the host waits, and where it happened."""

    kind: str
    waits: bool
    where: str


class OtherDeviceError(RuntimeError):
    """What a real device would refuse."""


class PretendedTensor(torch.Tensor):
    """A CPU tensor that says it is on the device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> PretendedTensor:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=device,
            requires_grad=inner.requires_grad,
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _active is None:
            raise RuntimeError(f"{func} on a pretended device, outside of it")
        return _active.dispatch(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Pretended({tuple(self.shape)}, {self.dtype}, {self.device})"

    def tolist(self) -> Any:
        assert _active is not None
        _active.note("item", True)
        return self.inner.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy; use Tensor.cpu() first")

    __array__ = numpy

    def data_ptr(self) -> int:
        return self.inner.data_ptr()


class PretendedDevice(TorchDispatchMode):
    """Makes ``kind`` a device that PyTorch has, while it is entered.

    Args:
        kind: ``cuda``, or any other name, for a device of another vendor, which has no float64.
    """

    def __init__(self, kind: str = "cuda") -> None:
        super().__init__()
        self.kind = kind
        self.device = torch.device("cpu")
        self.events: list[Event] = []
        self.kernels = 0  # operators that ran on the device, those without work of their own (views) left out
        self._pinned: dict[int, torch.Tensor] = {}  # kept, so that no other memory gets their addresses
        self._patches = ExitStack()

    def counts(self, since: int = 0) -> Counter[tuple[str, bool]]:
        """How often each kind of event happened, from event number ``since`` on; the flag says whether the host waited."""
        return Counter((event.kind, event.waits) for event in self.events[since:])

    def places(self, since: int = 0) -> str:
        """All events with their places, most frequent first, for a failed test to show."""
        counted = Counter(self.events[since:]).most_common()
        return "\n".join(f"{n:5} x {e.kind:9}{'waits' if e.waits else '     '} {e.where}" for e, n in counted)

    def note(self, kind: str, waits: bool) -> None:
        frame = sys._getframe(1)
        first = ""
        while frame is not None:
            name = frame.f_code.co_filename
            if "/sgid_transforms/" in name:
                where = f"{name.rpartition('/sgid_transforms/')[2]}:{frame.f_lineno}"
                self.events.append(Event(kind, waits, f"{where} <- {first}" if first else where))
                return
            if not first and "/torch/" not in name and "pretended" not in name:
                first = f"{name.rpartition('/')[2]}:{frame.f_lineno}"
            frame = frame.f_back
        self.events.append(Event(kind, waits, first))

    def __enter__(self) -> PretendedDevice:
        global _active
        assert _active is None, "one pretended device at a time"
        _active = self
        patch = self._patches.enter_context
        if self.kind == "cuda":
            torch._C._ensureCUDADeviceGuardSet()  # as FakeTensorMode does where there is no driver
        else:
            _name_other(self.kind)
        self.device = torch.device(self.kind, 0)
        module = torch.get_device_module(self.kind)
        fakes: dict[str, Any] = {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "_lazy_init": lambda *args, **kwargs: None,
            "mem_get_info": lambda *args: (24 << 30, 80 << 30),
            "memory_allocated": lambda *args: 0,
            "max_memory_allocated": lambda *args: 1 << 30,
            "reset_peak_memory_stats": lambda *args: None,
            "get_device_name": lambda *args: f"pretended {self.kind}",
            "is_bf16_supported": lambda *args, **kwargs: True,
            "empty_cache": lambda: None,
            "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
            "synchronize": lambda *args: self.note("event", True),
        }
        for name, value in fakes.items():
            patch(mock.patch.object(module, name, value, create=True))
        known: dict[str, Any] = {
            "current_accelerator": torch.device(self.kind),
            "is_available": True,
            "device_count": 1,
            "current_device_index": 0,
        }
        for name, value in known.items():
            patch(mock.patch.object(torch.accelerator, name, return_value=value))
        stream = "stream of", self.device
        patch(mock.patch.object(torch.accelerator, "current_stream", side_effect=lambda device: stream if device else None))
        patch(mock.patch.object(torch.accelerator, "synchronize", side_effect=lambda device=None: self.note("event", True)))
        pin, event = self._pin, partial(_PretendedEvent, self)
        patch(mock.patch.object(torch.Tensor, "pin_memory", lambda tensor, *args: pin(tensor)))
        patch(mock.patch.object(torch, "Event", side_effect=lambda *args, **kwargs: event()))
        # Wrappers have no version counters in inference mode; no_grad serves as well here.
        mode = torch.autograd.grad_mode.inference_mode
        held: dict[int, Any] = {}

        def enter(this: Any) -> None:
            held[id(this)] = torch.no_grad()
            held[id(this)].__enter__()

        patch(mock.patch.object(mode, "__enter__", enter))
        patch(mock.patch.object(mode, "__exit__", lambda this, *args: held.pop(id(this)).__exit__(*args)))
        # torch.tensor(list, device=...) makes a CPU tensor and sends it through the dispatcher.
        self._patches.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        # Module.to makes new parameters, instead of putting wrappers into the data of the old ones.
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        self._patches.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        global _active
        super().__exit__(*args)
        _active = None
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.dispatch(func, args, kwargs or {})

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operator on the CPU, as the device would."""
        packet, target = func.overloadpacket, kwargs.get("device")
        if packet is aten._to_copy:
            return self._copy_to(func, args, kwargs)
        if packet is aten.copy_:
            return self._copy_into(args, kwargs)
        flat, spec = tree_flatten((args, kwargs))
        tensors = [one for one in flat if isinstance(one, torch.Tensor)]
        own = [one for one in tensors if isinstance(one, PretendedTensor)]
        if own:
            self._refuse_others(func, packet, args, tensors)
            if packet in (aten._local_scalar_dense, aten.equal, aten.is_nonzero, *_SIZE_FROM_VALUES):
                self.note("item", True)
        here = self._is_here(target) or (bool(own) and target is None)
        inner = [one.inner if isinstance(one, PretendedTensor) else one for one in flat]
        inner = [torch.device("cpu") if isinstance(one, torch.device) and one.type == self.kind else one for one in inner]
        run_args, run_kwargs = tree_unflatten(inner, spec)
        pin = run_kwargs.pop("pin_memory", None)
        if here and run_kwargs.get("device") is not None:
            run_kwargs["device"] = torch.device("cpu")
        made = func(*run_args, **run_kwargs)
        if packet is aten._local_scalar_dense:
            return made
        if not here:
            if pin:
                self._pinned[made.untyped_storage().data_ptr()] = made
            return made
        known = {id(one.inner): one for one in own}
        self.kernels += not _is_view(func)

        def wrap(one: Any) -> Any:
            if not isinstance(one, torch.Tensor):
                return one
            return known[id(one)] if id(one) in known else self._wrap(one)

        return tree_map(wrap, made)

    def _copy_to(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        source, target = args[0], kwargs.get("device")
        was = isinstance(source, PretendedTensor)
        now = was if target is None else self._is_here(target)
        quick = bool(kwargs.get("non_blocking"))
        if now and not was:
            self.note("upload", not (quick and source.untyped_storage().data_ptr() in self._pinned))
        if was and not now:
            assert not quick, "a non-blocking copy to memory that is not pinned may be read before it is there"
            self.note("download", True)
        inner = source.inner if was else source
        self.kernels += was and now
        made = func(inner, **{name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")})
        return self._wrap(made) if now else made

    def _copy_into(self, args: Any, kwargs: dict[str, Any]) -> Any:
        target, source = args[0], args[1]
        quick = bool(kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        there, here = isinstance(target, PretendedTensor), isinstance(source, PretendedTensor)
        self.kernels += there and here
        if there != here:
            host = source if there else target
            self.note("upload" if there else "download", not (quick and host.untyped_storage().data_ptr() in self._pinned))
        (target.inner if there else target).copy_(source.inner if here else source)
        return target

    def _refuse_others(self, func: Any, packet: Any, args: Any, tensors: list[torch.Tensor]) -> None:
        for one in tensors:
            if isinstance(one, PretendedTensor) or one.dim() == 0:  # scalars may mix
                continue
            if packet in _INDEXING and any(one is index for index in args[1] or ()):
                self.note("upload", True)
                continue
            raise OtherDeviceError(
                f"expected all tensors on {self.device}, but one of shape {tuple(one.shape)} is on the CPU: {func}"
            )
        if packet in _INDEXING and any(one is not None and one.dtype is torch.bool for one in args[1] or ()):
            self.note("item", True)

    def _wrap(self, tensor: torch.Tensor) -> PretendedTensor:
        if self.kind != "cuda" and tensor.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"{self.device} has no float64")
        return PretendedTensor(tensor, self.device)

    def _is_here(self, device: Any) -> bool:
        return device is not None and torch.device(device).type == self.kind

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        assert not isinstance(tensor, PretendedTensor)
        made = tensor.clone()
        self._pinned[made.untyped_storage().data_ptr()] = made
        return made


def _is_view(func: Any) -> bool:
    alias = func._schema.returns[0].alias_info if func._schema.returns else None
    return alias is not None and not alias.is_write


class _PretendedEvent:
    """An event that the device has always reached already."""

    def __init__(self, device: PretendedDevice) -> None:
        self._device, self._recorded = device, 0.0

    def record(self, stream: Any) -> None:
        assert stream == ("stream of", self._device.device), "the copy runs on that device's stream"
        self._recorded = time.perf_counter()

    def elapsed_time(self, other: _PretendedEvent) -> float:
        return 1000 * (other._recorded - self._recorded)

    def synchronize(self) -> None:
        assert self._recorded, "an event that was never recorded is waited for in vain"
        self._device.note("event", True)


def _name_other(kind: str) -> None:
    """Give PyTorch's key for devices of other packages a name; this can be done once in a process."""
    global _named
    if _named:
        return
    from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

    class Absent(_DummyBackendModule):
        """What this process has of that kind when no pretended device is entered: nothing."""

        def is_available(self) -> bool:
            return False

        def device_count(self) -> int:
            return 0

    _setup_privateuseone_for_python_backend(kind, Absent())
    _named = True
