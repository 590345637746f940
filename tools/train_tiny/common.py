"""What every training stage shares: seeded batches, a schedule that can be extended, EMA, checkpoints and a log."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.transforms import functional as TF
from tqdm import tqdm


def parser(description: str, **defaults: float) -> argparse.ArgumentParser:
    """Arguments that all stages take; a stage adds its own."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", required=True, help="folder with the parquet files, or for torchvision's CIFAR-10 download")
    p.add_argument("--work", required=True, type=Path, help="folder for checkpoints and logs; a second run resumes")
    p.add_argument("--steps", type=int, default=int(defaults.get("steps", 1000)))
    p.add_argument("--batch-size", type=int, default=int(defaults.get("batch_size", 64)))
    p.add_argument("--lr", type=float, default=defaults.get("lr", 1e-3))
    p.add_argument("--decay", type=float, default=defaults.get("decay", 0.4), help="last share of steps in which lr falls to 0")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=0, help="torch threads (0: torch's own choice)")
    return p


def rng(seed: int, step: int) -> torch.Generator:
    """A generator that depends on (seed, step) alone: a resumed run sees the batches that it would have seen."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def lr_factor(step: int, steps: int, decay: float, warmup: int = 100) -> float:
    """Warm-up, constant, linear decay over the last ``decay`` share: more ``steps`` at a resume just postpones the decay."""
    rest = (steps - step) / max(1.0, steps * decay)
    return min(1.0, (step + 1) / warmup, max(0.0, rest))


class Combined:
    """Several optimizers over disjoint parameters, used as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)


class EMA:
    """Exponential moving average of parameters and buffers of ``modules``."""

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self.modules = modules
        self.shadow = {name: {k: v.detach().clone() for k, v in m.state_dict().items()} for name, m in modules.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        for name, module in self.modules.items():
            for key, value in module.state_dict().items():
                shadow = self.shadow[name][key]
                if shadow.is_floating_point():
                    shadow.lerp_(value, 1 - decay)
                else:
                    shadow.copy_(value)


@dataclass
class Stage:
    """One training stage: ``loss(step, generator) -> (loss, scalars)`` is called ``steps`` times."""

    name: str
    modules: dict[str, nn.Module]
    loss: Callable[[int, torch.Generator], tuple[torch.Tensor, dict[str, float]]]
    optimizer: torch.optim.Optimizer | Combined
    ema_decay: float = 0.998
    clip: float = 1.0
    evaluate: Callable[[], dict[str, float]] | None = None
    evaluate_every: int = 0

    def run(self, args: argparse.Namespace) -> None:
        """Train until ``args.steps``, from the last checkpoint on; leaves ``<work>/<name>.pt`` with the averaged weights."""
        args.work.mkdir(parents=True, exist_ok=True)
        path = args.work / f"{self.name}.pt"
        ema = EMA(self.modules, self.ema_decay)
        start, seconds = 0, 0.0
        if path.exists():
            state = torch.load(path, weights_only=True)
            for name, module in self.modules.items():
                module.load_state_dict(state["modules"][name])
            ema.shadow = state["ema"]
            if state["optimizer"] is not None:  # None: weights taken from a bundle
                self.optimizer.load_state_dict(state["optimizer"])
            start, seconds = state["step"], state["seconds"]
        base = [group.get("base_lr", group["lr"]) for group in self.optimizer.param_groups]
        for group, lr in zip(self.optimizer.param_groups, base, strict=True):
            group["base_lr"] = lr
        parameters = [p for m in self.modules.values() for p in m.parameters() if p.requires_grad]
        began = saved = time.monotonic()
        mean: dict[str, float] = {}

        def save(step: int) -> None:
            spent = seconds + time.monotonic() - began
            state = {
                "modules": {n: m.state_dict() for n, m in self.modules.items()},
                "ema": ema.shadow,
                "optimizer": self.optimizer.state_dict(),
                "step": step,
                "seconds": spent,
            }
            temporary = path.with_suffix(".tmp")
            torch.save(state, temporary)
            os.replace(temporary, path)

        with (
            open(args.work / f"{self.name}.jsonl", "a") as log,
            tqdm(range(start, args.steps), initial=start, total=args.steps, desc=self.name, mininterval=10) as bar,
        ):
            for step in bar:
                for group, lr in zip(self.optimizer.param_groups, base, strict=True):
                    group["lr"] = lr * lr_factor(step, args.steps, args.decay)
                loss, scalars = self.loss(step, rng(args.seed, step))
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if self.clip:
                    nn.utils.clip_grad_norm_(parameters, self.clip)
                self.optimizer.step()
                ema.update(step)
                for key, value in {"loss": loss.item(), **scalars}.items():
                    mean[key] = 0.98 * mean.get(key, value) + 0.02 * value
                last = step + 1 == args.steps
                if (step + 1) % 100 == 0 or last:
                    row = {"step": step + 1, "lr": self.optimizer.param_groups[0]["lr"], **mean}
                    if self.evaluate and self.evaluate_every and ((step + 1) % self.evaluate_every == 0 or last):
                        live = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in self.modules.items()}
                        for name, module in self.modules.items():
                            module.load_state_dict(ema.shadow[name])
                            module.eval()
                        with torch.no_grad():
                            row |= self.evaluate()
                        for name, module in self.modules.items():
                            module.load_state_dict(live[name])
                            module.train()
                    row["seconds"] = seconds + time.monotonic() - began
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                    bar.set_postfix({k: f"{v:.4g}" for k, v in row.items() if k not in ("step", "seconds", "lr")})
                if last or time.monotonic() - saved > 120:
                    save(step + 1)
                    saved = time.monotonic()


def averaged(work: Path, name: str) -> dict[str, dict[str, torch.Tensor]]:
    """The averaged weights of a finished (or running) stage, by module name."""
    path = Path(work) / f"{name}.pt"
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}; run the {name} stage first")
    return torch.load(path, weights_only=True)["ema"]


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 in [0, 255] to float in [-1, 1], channels last in memory."""
    return images.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def coin(count: int, generator: torch.Generator) -> torch.Tensor:
    """``count`` fair draws, as booleans."""
    return torch.rand(count, generator=generator) < 0.5


def flip_some(images: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """Mirror those images of a batch (B, C, H, W) for which ``flip`` (B,) holds."""
    return torch.where(flip[:, None, None, None], images.flip(-1), images)


def shift_some(images: torch.Tensor, pixels: int, generator: torch.Generator) -> torch.Tensor:
    """Reflect-pad by ``pixels`` and crop every image at its own offset."""
    batch, _, height, width = images.shape
    padded = TF.pad(images, [pixels] * 4, padding_mode="reflect")
    y, x = torch.randint(0, 2 * pixels + 1, (2, batch), generator=generator)
    rows = (y[:, None] + torch.arange(height))[:, None, :, None]
    columns = (x[:, None] + torch.arange(width))[:, None, None, :]
    return padded[torch.arange(batch)[:, None, None, None], torch.arange(images.shape[1])[None, :, None, None], rows, columns]
