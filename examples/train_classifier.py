"""Train an image classifier with SGID in plain PyTorch: on a folder of class folders, or on the images of the package.

    python examples/train_classifier.py                                  # bundled images, bundled model
    python examples/train_classifier.py --data photos --size 128 --model stabilityai/sd-turbo --device cuda
    python examples/train_classifier.py --data photos --size 128 -p 0    # the same training without variants

Files that cannot be used are listed with the reason and left out; the exit code is then 3, else 0.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, default_collate
from torchvision import models
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from sgid_transforms import Recipe, SGIDAugment, SGIDError
from sgid_transforms.bulk import scan_folder
from sgid_transforms.files import show
from sgid_transforms.images import load_image
from sgid_transforms.images.folders import Skipped
from sgid_transforms.images.reading import is_image_name


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, help="one folder of images per class; default: the images of the package")
    p.add_argument("--test", type=Path, help="the same for testing; default: every fourth image of --data")
    p.add_argument("--stores", type=Path, default=Path("."), help="where captions.sqlite and variants/ are, or will be")
    p.add_argument("--model", default="tiny", help="tiny, a preset, a checkpoint id or a folder")
    p.add_argument("--recipe", type=Path, help="a recipe file, instead of --model")
    p.add_argument("-p", type=float, default=0.5, help="probability that an image is replaced; 0: train without variants")
    p.add_argument("-k", "--variants-per-image", type=int, default=4)
    p.add_argument("--on-miss", choices=("generate", "queue", "original"), default="generate")
    p.add_argument("--mix", action="store_true", help="MixUp or CutMix on top, by turns")
    p.add_argument("--arch", default="resnet18", help="any classification model of torchvision")
    p.add_argument("--size", type=int, default=32, help="side of the training images in pixels")
    p.add_argument("--epochs", type=int, default=10)
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--lr", type=float, default=0.05)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args(argv)


def image_folder(root: Path, skipped: list[Skipped], transform: Callable[[Any], Any] | None = None) -> ImageFolder:
    """An ``ImageFolder`` without its unusable files, which would end the training in the middle of an epoch.

    ``load_image`` turns photos upright as their EXIF data say; torchvision's own loader does not.
    """
    bad = {one.path for one in skipped}

    def usable(path: str) -> bool:
        return is_image_name(Path(path)) and Path(path) not in bad

    return ImageFolder(str(root), transform, loader=load_image, is_valid_file=usable, allow_empty=True)


def model_for(arch: str, classes: int, size: int) -> nn.Module:
    model: nn.Module = models.get_model(arch, weights=None, num_classes=classes)
    if size <= 64 and isinstance(model, models.ResNet):  # its stem would leave little of so small an image
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    return model


def mix_batches(classes: int) -> Callable[[list[Any]], Any]:
    """Both mix finished batches, so they go into ``collate_fn``, after SGID and everything else."""
    mix = v2.RandomChoice([v2.MixUp(num_classes=classes), v2.CutMix(num_classes=classes)])
    return lambda samples: mix(*default_collate(samples))


@torch.inference_mode()
def accuracy(model: nn.Module, loader: Any, device: str) -> float:
    model.eval()
    right = total = 0
    for images, labels in loader:
        right += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
        total += len(labels)
    return right / max(1, total)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    torch.manual_seed(args.seed)
    data = args.data or Path(str(files("sgid_transforms"))) / "assets" / "samples"
    skipped = list(scan_folder(data).skipped)
    test_skipped = list(scan_folder(args.test).skipped) if args.test else skipped

    recipe = Recipe.from_toml(args.recipe) if args.recipe else Recipe.for_model(args.model)
    sgid = SGIDAugment(
        recipe=recipe,
        captions=args.stores / "captions.sqlite",
        variants=args.stores / "variants",
        p=args.p,
        variants_per_image=args.variants_per_image,
        on_miss=args.on_miss,
    )
    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)]
    usual = [v2.RandomResizedCrop(args.size, (0.5, 1.0)), v2.RandomHorizontalFlip(), v2.RandAugment()]
    augmented = image_folder(data, skipped, v2.Compose([sgid, *usual, *finish]))  # SGID first: it must see the original
    still = v2.Compose([v2.Resize((args.size, args.size)), *finish])
    plain = image_folder(args.test or data, test_skipped, still)
    if plain.classes != augmented.classes:
        sys.exit(f"error: {args.test} has other classes than {data}; give it the same class folders")
    everything = range(len(augmented))
    train = Subset(augmented, everything if args.test else [i for i in everything if i % 4 != 3])
    test = plain if args.test else Subset(plain, everything[3::4])

    if args.p > 0:  # captions and similarities: a second run does only what is new or has changed
        sgid.prepare(Subset(image_folder(data, skipped), train.indices), device=args.device)
    model = model_for(args.arch, len(augmented.classes), args.size).to(args.device)
    optimiser = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    loader = DataLoader(
        train,
        args.batch_size,
        shuffle=True,
        num_workers=args.workers,
        drop_last=len(train) > args.batch_size,
        collate_fn=mix_batches(len(augmented.classes)) if args.mix else None,
    )
    test_loader = DataLoader(test, args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, args.lr, total_steps=args.epochs * len(loader))
    # One process owns the generator and serves all workers. It is not needed where nothing is generated.
    with sgid.serve(device=args.device) if args.p > 0 and args.on_miss != "original" else nullcontext():
        for epoch in range(args.epochs):
            model.train()
            for images, labels in loader:
                loss = F.cross_entropy(model(images.to(args.device)), labels.to(args.device))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
            tested = f"accuracy {accuracy(model, test_loader, args.device):.1%} on {len(test)} images"
            print(f"epoch {epoch + 1}/{args.epochs}: loss {loss.item():.3f}, {tested}", flush=True)
    print(sgid.stats().summary())
    everywhere = [*skipped, *(test_skipped if args.test else [])]
    for one in everywhere:
        print(f"left out: {show(one.path)}: {one.reason}", file=sys.stderr)
    return 3 if everywhere else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SGIDError as error:
        sys.exit(f"error: {error}")
