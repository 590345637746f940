"""A small, quickly trained CIFAR convnet, after airbench (Jordan 2024, arXiv 2404.00498): whitening, GELU, label smoothing.

It is trained twice, with different seeds: ``judge`` measures label agreement and touches no other model; ``teacher`` hands
its soft labels to the vision tower of the bundled CLIP.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from common import Stage, averaged, coin, flip_some, parser, shift_some
from data import load_split

_MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)
_STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(1, 3, 1, 1)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, 32, 32) to the classifier's input."""
    return ((images.float() / 255 - _MEAN) / _STD).contiguous(memory_format=torch.channels_last)


class Group(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside, momentum=0.4)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside, momentum=0.4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.norm2(self.conv2(x)))


class Classifier(nn.Module):
    def __init__(self, widths: tuple[int, int, int] = (64, 128, 192)) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2, bias=True)
        self.groups = nn.Sequential(Group(24, widths[0]), Group(widths[0], widths[1]), Group(widths[1], widths[2]))
        self.head = nn.Linear(widths[2], 10, bias=False)

    @torch.no_grad()
    def init_whitening(self, images: torch.Tensor) -> None:
        """Set the first layer to the eigenvectors of 2x2 patches and their negatives, and freeze its weight."""
        x = normalize(images)
        patches = F.unfold(x, 2).transpose(1, 2).reshape(-1, 12)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        kernels = (vectors / (values + 5e-4).sqrt()).T.reshape(12, 3, 2, 2).flip(0)
        self.whiten.weight.copy_(torch.cat([kernels, -kernels]))
        self.whiten.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.groups(F.gelu(self.whiten(x)))
        return self.head(x.amax((2, 3))) / 9


def load(work: Path, name: str) -> Classifier:
    model = Classifier()
    model.load_state_dict(averaged(work, name)["model"])
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@torch.no_grad()
def predict(model: Classifier, images: torch.Tensor) -> torch.Tensor:
    """Logits (N, 10) for uint8 (N, 3, 32, 32), averaged over the image and its mirror."""
    out = [model(x) + model(x.flip(-1)) for x in map(normalize, images.split(500))]
    return torch.cat(out) / 2


def main() -> None:
    p = parser(__doc__.splitlines()[0], steps=2500, batch_size=128, lr=1.0, decay=0.8)
    p.add_argument("--name", default="judge", choices=("judge", "teacher"))
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data, test = load_split(args.data, "pretrain"), load_split(args.data, "test")
    model = Classifier()
    model.init_whitening(data.images[:2000])
    model.to(memory_format=torch.channels_last)

    def loss(step: int, g: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        index = torch.randint(len(data), (args.batch_size,), generator=g)
        x = shift_some(flip_some(data.images[index], coin(len(index), g)), 2, g)
        logits = model(normalize(x))
        y = data.labels[index]
        accuracy = (logits.argmax(1) == y).float().mean().item()
        return F.cross_entropy(logits, y, label_smoothing=0.2), {"accuracy": accuracy}

    def evaluate() -> dict[str, float]:
        return {"test_accuracy": (predict(model, test.images).argmax(1) == test.labels).float().mean().item()}

    norms = [p for n, p in model.named_parameters() if "norm" in n]
    rest = [p for n, p in model.named_parameters() if "norm" not in n and p.requires_grad]
    lr = args.lr
    optimizer = torch.optim.SGD(
        [{"params": rest, "weight_decay": 5e-4}, {"params": norms, "lr": lr, "weight_decay": 0.0}],
        lr=lr, momentum=0.9, nesterov=True,
    )  # fmt: skip
    stage = Stage(args.name, {"model": model}, loss, optimizer, ema_decay=0.99, clip=0.0)
    stage.evaluate, stage.evaluate_every = evaluate, 500
    stage.run(args)


if __name__ == "__main__":
    main()
