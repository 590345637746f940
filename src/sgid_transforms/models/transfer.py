"""Copies between the CPU and a device: many tensors in one transfer, and no waiting for the device where that is safe.

The host's side of a transfer is pinned memory, from which a device may copy while the host goes on: PyTorch keeps such memory
until the copy is done. On MPS all copies wait, since one that does not may read memory that is freed already (pytorch#189690).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on a device; those that are on the CPU go over in one transfer, and are of one dtype."""
    away = [tensor for tensor in tensors if tensor.device.type == "cpu"]
    if device.type == "cpu" or not away:
        return [tensor.to(device) for tensor in tensors]
    flat = torch.cat([tensor.reshape(-1) for tensor in away])
    flat = flat.to(device) if _waits(device) else flat.pin_memory().to(device, non_blocking=True)
    parts = iter(torch.split(flat, [tensor.numel() for tensor in away]))
    return [next(parts).view(tensor.shape) if tensor.device.type == "cpu" else tensor.to(device) for tensor in tensors]


def download(tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Begin to copy tensors of one dtype and device to the CPU, in one transfer.

    Returns:
        A function that waits until they are there. Each has memory of its own.
    """
    if not tensors or tensors[0].device.type == "cpu":
        return lambda: [
            tensor if _is_whole(tensor) else tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors
        ]
    device, shapes = tensors[0].device, [tensor.shape for tensor in tensors]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])

    def parts(host: Tensor) -> list[Tensor]:
        split = torch.split(host, [shape.numel() for shape in shapes])
        return [part.view(shape).clone() for part, shape in zip(split, shapes, strict=True)]

    if _waits(device):
        there = parts(flat.cpu())
        return lambda: there
    host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
    host.copy_(flat, non_blocking=True)
    event = torch.Event(device)
    event.record(torch.accelerator.current_stream(device))  # of this device, which need not be the current one

    def wait() -> list[Tensor]:
        event.synchronize()
        return parts(host)

    return wait


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own, and does not keep a whole batch's."""
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes


def _waits(device: torch.device) -> bool:
    return device.type == "mps"
