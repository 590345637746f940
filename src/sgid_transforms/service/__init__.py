"""The process that owns the model, and what its clients need to talk to it."""

from sgid_transforms.service.client import ServiceClient
from sgid_transforms.service.process import GenerationService
from sgid_transforms.service.protocol import Item
from sgid_transforms.transforms.state import SharedState

__all__ = ["GenerationService", "Item", "ServiceClient", "SharedState"]
