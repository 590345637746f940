"""The process that owns the model, and what its clients need to talk to it."""

from sgid_transforms.service.client import ServiceClient
from sgid_transforms.service.counters import SharedState
from sgid_transforms.service.process import GenerationService
from sgid_transforms.service.wire import Item

__all__ = ["GenerationService", "Item", "ServiceClient", "SharedState"]
