"""One run: a classifier, a number of steps, its accuracy. Interrupted, it goes on from its last checkpoint."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from .batches import Batches, evaluation_images, normalise
from .data import Pool
from .models import build_model


@dataclass(frozen=True)
class Training:
    """Everything that decides a run's result, beside its images and its augmentation.

    Args:
        model: a name for `build_model`.
        pretrained: start from the library's weights.
        steps: optimiser steps.
        batch_size: images in a step.
        size: side of the square that the model sees, in pixels.
        optimizer: ``sgd`` (Nesterov momentum 0.9) or ``adamw``.
        lr: highest learning rate; reached after a sixth of the steps, and 0 at the end (half a cosine).
        weight_decay: of all weights but biases and normalisations.
        smoothing: label smoothing.
        dtype: ``float32``, or ``bfloat16`` or ``float16`` by autocast.
    """

    model: str = "small-resnet"
    pretrained: bool = False
    steps: int = 1200
    batch_size: int = 64
    size: int = 32
    optimizer: str = "sgd"
    lr: float = 0.1
    weight_decay: float = 5e-3
    smoothing: float = 0.1
    dtype: str = "bfloat16"


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Linear warm-up over the first sixth, then half a cosine to 0."""
    warm = max(steps // 6, 1)
    if step < warm:
        return highest * (step + 1) / warm
    return highest * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1))) / 2


def train(
    training: Training,
    batches: Batches,
    *,
    seed: int,
    device: str = "cpu",
    workers: int = 0,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 600.0,
) -> nn.Module:
    """Train a classifier.

    Args:
        training: settings.
        batches: one for each step.
        seed: of the weights.
        device: where the model is.
        workers: processes that make batches; 0: this one.
        checkpoint: file in which the state is kept meanwhile; a run that finds one goes on there. Removed by the caller.
        checkpoint_seconds: time between two of them.
    """
    torch.manual_seed(seed)
    model = build_model(training.model, len(batches.pool.classes), pretrained=training.pretrained)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = _optimizer(training, model)
    first = 0
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    scaler = torch.amp.GradScaler(enabled=training.dtype == "float16")
    # A batch for each item: the loader's own batching is off.
    loader = DataLoader(Subset(batches, range(first, training.steps)), batch_size=None, num_workers=workers)
    saved = time.monotonic()
    for step, (images, labels) in enumerate(loader, start=first):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, training.steps, training.lr)
        images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        labels = labels.to(device, non_blocking=True)
        with _autocast(training.dtype, device):
            scores = model(images)
        loss = F.cross_entropy(scores.float(), labels, label_smoothing=training.smoothing)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if checkpoint is not None and time.monotonic() - saved > checkpoint_seconds:
            _save(checkpoint, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
            saved = time.monotonic()
    return model


@torch.no_grad()
def accuracy(
    model: nn.Module, training: Training, pool: Pool, indices: Sequence[int], mean: Tensor, std: Tensor, device: str = "cpu"
) -> float:
    """Percentage of images whose class the model recognises."""
    model.eval()
    mean, std = mean.view(1, 3, 1, 1), std.view(1, 3, 1, 1)
    right = 0
    for start in range(0, len(indices), 256):
        chosen = list(indices[start : start + 256])
        pixels = normalise(evaluation_images(pool, chosen, training.size), mean, std).to(device)
        with _autocast(training.dtype, device):
            scores = model(pixels)
        right += int((scores.argmax(1).cpu() == pool.labels[chosen]).sum())
    return 100 * right / len(indices)


def _autocast(dtype: str, device: str) -> torch.autocast:
    kind = torch.device(device).type
    return torch.autocast(kind, getattr(torch, dtype) if dtype != "float32" else None, enabled=dtype != "float32")


def _optimizer(training: Training, model: nn.Module) -> torch.optim.Optimizer:
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=training.lr)
    return torch.optim.SGD(groups, lr=training.lr, momentum=0.9, nesterov=True)


def _save(path: Path, state: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)
