"""Train with Lightning and SGID: the data module owns the augmentation, a callback schedules how often it acts.

pip install lightning
python examples/lightning_module.py                     # bundled images, bundled model
python examples/lightning_module.py --data photos --size 128 --model stabilityai/sd-turbo
"""

import argparse
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.models import get_model
from torchvision.transforms import v2

from sgid_transforms import SGIDAugment, SGIDDataset
from sgid_transforms.images import load_image


class Images(lightning.LightningDataModule):
    """An ``ImageFolder`` whose training images are replaced by variants; every fourth image is for validation."""

    def __init__(self, root: Path, sgid: SGIDAugment, size: int, batch_size: int, workers: int) -> None:
        super().__init__()
        self.root, self.sgid, self.size, self.batch_size, self.workers = root, sgid, size, batch_size, workers
        self.classes = ImageFolder(str(root)).classes

    def prepare_data(self) -> None:
        """Lightning calls this in one process of each machine: captions and similarities, once."""
        self.sgid.prepare(self._part(training=True))

    def train_dataloader(self) -> Any:
        after = v2.Compose([v2.RandomResizedCrop(self.size, (0.5, 1.0)), v2.RandomHorizontalFlip(), *self._finish()])
        # Asks for all missing variants of a batch in one request, which a Compose cannot do.
        train = SGIDDataset(self._part(training=True), self.sgid, after)
        return DataLoader(train, self.batch_size, shuffle=True, num_workers=self.workers, drop_last=True)

    def val_dataloader(self) -> Any:
        still = v2.Compose([v2.Resize((self.size, self.size)), *self._finish()])
        return DataLoader(self._part(training=False, transform=still), self.batch_size)

    def _part(self, training: bool, transform: Any = None) -> "Subset[Any]":
        folder = ImageFolder(str(self.root), transform, loader=load_image)
        return Subset(folder, [index for index in range(len(folder)) if (index % 4 != 3) == training])

    def _finish(self) -> list[Any]:
        return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)]


class RealAtTheEnd(lightning.Callback):
    """Switches SGID off in the last tenth of the epochs, at least the last one, to end on real images."""

    def __init__(self, sgid: SGIDAugment) -> None:
        self.sgid, self.p = sgid, sgid.p

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        epochs = trainer.max_epochs or 1
        real = trainer.current_epoch >= epochs - max(1, epochs // 10)
        self.sgid.p = 0.0 if real else self.p  # running workers follow

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        print(f"epoch {trainer.current_epoch}: {self.sgid.epoch_summary()}")


class Classifier(lightning.LightningModule):
    """Any classification model of torchvision. It knows nothing of SGID."""

    def __init__(self, arch: str, classes: int, lr: float) -> None:
        super().__init__()
        self.model: nn.Module = get_model(arch, weights=None, num_classes=classes)
        self.lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        self.log("val_accuracy", (self.model(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, default=Path(str(files("sgid_transforms"))) / "assets" / "samples")
    p.add_argument("--stores", type=Path, default=Path("."), help="where captions.sqlite and variants/ are, or will be")
    p.add_argument("--model", default="tiny", help="tiny, a preset, a checkpoint id or a folder")
    p.add_argument("-p", type=float, default=0.5)
    p.add_argument("--arch", default="mobilenet_v3_small")
    p.add_argument("--size", type=int, default=32)
    p.add_argument("--epochs", type=int, default=10)
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--lr", type=float, default=0.05)
    p.add_argument("--workers", type=int, default=2)
    args = p.parse_args(argv)
    lightning.seed_everything(0)
    sgid = SGIDAugment(args.model, captions=args.stores / "captions.sqlite", variants=args.stores / "variants", p=args.p)
    data = Images(args.data, sgid, args.size, args.batch_size, args.workers)
    trainer = lightning.Trainer(
        max_epochs=args.epochs, callbacks=[RealAtTheEnd(sgid)], logger=False, enable_checkpointing=False
    )
    data.prepare_data()
    with sgid.serve():  # ranks of one machine share this process
        trainer.fit(Classifier(args.arch, len(data.classes), args.lr), datamodule=data)
    print(sgid.stats().summary())
    print(f"validation accuracy {float(trainer.callback_metrics['val_accuracy']):.1%}")


if __name__ == "__main__":
    main()
