"""The process that owns the model, and what its clients need to talk to it."""

from .client import ServiceClient
from .counters import SharedState
from .process import GenerationService
from .wire import Item

__all__ = ["GenerationService", "Item", "ServiceClient", "SharedState"]
