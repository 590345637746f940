"""Where missing variants come from: a service, or a model in this process."""

import threading
import time
from collections.abc import Sequence

import torch

from sgid_transforms.building.builder import VariantJob, VariantMaker, VariantOutcome, item_to_outcome, job_to_item
from sgid_transforms.building.factory import MakerSpec
from sgid_transforms.errors import GenerationError, ServiceError
from sgid_transforms.service.client import ServiceClient
from sgid_transforms.transforms.state import SharedState


class VariantSupply:
    """Asks the service for variants, or makes them here; belongs to one process, and loads nothing before it must.

    Args:
        spec (MakerSpec): How a model in this process is set up.
        state (SharedState): Its setting ``address`` says where the service is, if there is one.
    """

    def __init__(self, spec: MakerSpec, state: SharedState) -> None:
        self._spec, self._state = spec, state
        self._maker: VariantMaker | None = None
        self._client: ServiceClient | None = None
        self._lock = threading.Lock()

    @property
    def full(self) -> bool:
        """The service's queue was full a moment ago: asking would be in vain, and costs time."""
        client = self._service()
        return client is not None and client.full

    def enqueue(self, jobs: Sequence[VariantJob]) -> None:
        """Ask for variants without waiting.

        Raises:
            ServiceError: There is no service.
        """
        client = self._service()
        if client is None:
            raise ServiceError("on_miss='queue' needs a running service; run the loop inside `with sgid.serve():`")
        dropped = client.enqueue([job_to_item(self._spec.recipe.fingerprint, job) for job in jobs])
        self._state.add("queued", len(jobs))
        if dropped:
            self._state.add("dropped", dropped)

    def wait_for(self, jobs: Sequence[VariantJob]) -> list[VariantOutcome]:
        """Variants, however long they take.

        Raises:
            ServiceError: The service died, or there is none and this is a worker.
            GenerationError: The generator in this process raised. That of a service is in the outcomes.
        """
        start = time.perf_counter()
        try:
            client = self._service()
            if client is not None:
                items = client.generate([job_to_item(self._spec.recipe.fingerprint, job) for job in jobs])
                return [item_to_outcome(item) for item in items]
            with self._lock:
                maker = self._own_maker()
                try:
                    return maker(jobs)
                except Exception as error:
                    raise GenerationError(f"{type(error).__name__}: {error}") from error
        finally:
            self._state.add("waits")
            self._state.add("waited_us", int(1e6 * (time.perf_counter() - start)))

    def _service(self) -> ServiceClient | None:
        address = self._state.settings().get("address")
        if address is None:
            return None
        if self._client is None or self._client.address != address:
            self._client = ServiceClient(address)
        return self._client

    def _own_maker(self) -> VariantMaker:
        if torch.utils.data.get_worker_info() is not None:
            raise ServiceError(
                "a DataLoader worker would load a model of its own; run the loop inside `with sgid.serve(device=...):`, "
                "which shares one model, or pass num_workers=0, or on_miss='original'"
            )
        if self._maker is None:
            self._maker = self._spec.build()
        return self._maker
