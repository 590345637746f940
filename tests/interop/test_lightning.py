"""A Lightning ``Trainer.fit`` over an augmented loader."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from augment_fakes import OWN_CAPTIONS, captioned, fake_generator, image_folder, picture
from sgid_transforms.transforms.augment import SGIDAugment

# What Lightning's own code does with torch, and its advice for real trainings.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
]


def test_trainer_fits(tmp_path: Path) -> None:
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 3))

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            images, labels = batch
            return torch.nn.functional.cross_entropy(self.model(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

        def on_train_epoch_start(self) -> None:
            sgid.p = 1.0 if self.current_epoch else 0.0  # a schedule

    sgid = SGIDAugment(
        recipe=OWN_CAPTIONS, captions=tmp_path / "c.sqlite", variants=tmp_path / "v", p=0.5, generator=fake_generator()
    )
    sgid.captions.put_many(captioned(*map(picture, range(12))))
    chain = v2.Compose([sgid, v2.RandAugment(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    data = ImageFolder(image_folder(tmp_path / "data"), transform=chain)
    mix = v2.RandomChoice([v2.MixUp(num_classes=3), v2.CutMix(num_classes=3)])

    def collate(batch: list[Any]) -> Any:
        return mix(*torch.utils.data.default_collate(batch))

    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=4, shuffle=True, collate_fn=collate))
    assert (sgid.stats().seen, sgid.stats().gated) == (36, 24)
    assert trainer.current_epoch == 3
