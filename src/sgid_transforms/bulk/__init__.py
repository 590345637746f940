"""Captions and variants of a whole folder of class folders: what ``sgid caption`` and ``sgid generate`` do.

Each step is on disk before the next one begins, so a job can be killed at any moment; run it again to resume. Several processes
may work on the same stores at once.
"""

from sgid_transforms.bulk.captioning import CaptionReport, caption_folder, scan_folder
from sgid_transforms.bulk.estimating import Estimate, estimate_folder
from sgid_transforms.bulk.generating import GenerateReport, generate_folder
from sgid_transforms.bulk.plan import Models, Shard

__all__ = [
    "CaptionReport",
    "Estimate",
    "GenerateReport",
    "Models",
    "Shard",
    "caption_folder",
    "estimate_folder",
    "generate_folder",
    "scan_folder",
]
