"""The process that owns the model, and what its clients need to talk to it."""

from sgid_transforms.service.client import ServiceClient
from sgid_transforms.service.process import GenerationService

__all__ = ["GenerationService", "ServiceClient"]
