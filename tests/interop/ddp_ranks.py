"""What one rank of the distributed test does; spawned processes import it from here."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from augment_fakes import FakeCaptioner, FakeScorer, fake_generator
from sgid_transforms.transforms.augment import SGIDAugment
from sgid_transforms.transforms.dataset import SGIDDataset


class LoggingCaptioner(FakeCaptioner):
    """Notes how much it captioned."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self.log = log

    def caption(self, images: Sequence[torch.Tensor]) -> list[str]:
        with open(self.log, "a") as file:
            file.write(f"{len(images)}\n")
        return super().caption(images)


def train(rank: int, folder: Path) -> None:
    """Two epochs on a half of the data; the service's process and what was counted go into a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    data = ImageFolder(folder / "data")
    sgid = SGIDAugment(
        captions=folder / "captions.sqlite",
        variants=folder / "variants",
        p=1.0,
        variants_per_image=2,
        generator=fake_generator(folder / "generated"),
        captioner=LoggingCaptioner(folder / "captioned"),
        scorer=FakeScorer(),
    )
    sgid.prepare(data, progress=False)
    chain = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    dataset = SGIDDataset(data, sgid, chain)
    sampler = DistributedSampler(dataset, num_replicas=2, rank=rank)
    model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sgid.serve() as service:
        for epoch in range(2):
            sampler.set_epoch(epoch)
            for images, labels in DataLoader(dataset, batch_size=3, sampler=sampler, num_workers=1):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
        stats = sgid.stats()
        report = {"pid": service.pid, "owner": service.owner, "seen": stats.seen, "hits": stats.hits, "made": stats.generated}
        (folder / f"rank{rank}.json").write_text(json.dumps(report))
        dist.barrier()  # the rank that owns the service must not be the first to leave
    dist.destroy_process_group()
