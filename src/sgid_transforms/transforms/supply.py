"""Where missing variants come from: a service, or a model in this process."""

import threading
import time
from collections.abc import Sequence

import torch

from sgid_transforms.building.builder import Builder, BuilderSpec
from sgid_transforms.building.wanted import Outcome, Wanted
from sgid_transforms.errors import GenerationError, RecipeError, ServiceError
from sgid_transforms.service.client import ServiceClient, too_large
from sgid_transforms.transforms.state import SharedState


class VariantSupply:
    """Gets variants from the service, or makes them in this process. Belongs to one process; loads a model only if needed.

    Args:
        spec: How a model in this process is set up.
        state: Its setting ``address`` says where the service is, if there is one.
        timeout: Maximum seconds that `wait_for` waits for the service.
    """

    def __init__(self, spec: BuilderSpec, state: SharedState, timeout: float | None = None) -> None:
        self._spec, self._state, self._timeout = spec, state, timeout
        self._builder: Builder | None = None
        self._client: ServiceClient | None = None
        self._lock = threading.Lock()

    @property
    def full(self) -> bool:
        """Whether the service's queue was full a moment ago: asking again would only cost time."""
        client = self._service()
        return client is not None and client.full

    def enqueue(self, wanted: Sequence[Wanted]) -> None:
        """Request variants without waiting.

        Raises:
            ServiceError: There is no service.
            GenerationError: A picture is too large for the service; the others are under way.
        """
        client = self._service()
        if client is None:
            raise ServiceError("on_miss='queue' needs a running service; run the loop inside `with sgid.serve():`")
        reasons = [too_large(one) for one in wanted]
        fitting = [one for one, reason in zip(wanted, reasons, strict=True) if reason is None]
        if fitting:
            dropped = client.enqueue(fitting)
            self._state.add(queued=len(fitting))
            if dropped:
                self._state.add(dropped=dropped)
        if problems := [reason for reason in reasons if reason is not None]:
            self._state.add(failed=len(problems))
            raise GenerationError(problems[0])

    def wait_for(self, wanted: Sequence[Wanted]) -> list[Outcome]:
        """Request variants and wait for their outcomes.

        Raises:
            ServiceError: The service died or took too long, or there is none and this is a ``DataLoader`` worker.
            GenerationError: The generator in this process raised. Errors of a service's generator are in the outcomes.
        """
        start = time.perf_counter()
        try:
            client = self._service()
            if client is not None:
                outcomes = client.generate(wanted)
                for outcome in outcomes:
                    if outcome.counter is not None:
                        self._state.add(**{outcome.counter: 1})
                return outcomes
            with self._lock:
                try:
                    return self._own_builder()(wanted)
                except (ServiceError, GenerationError, RecipeError):
                    raise
                except Exception as error:  # a missing device, for instance
                    raise GenerationError(f"{type(error).__name__}: {error}") from error
        finally:
            self._state.add(waits=1, waited_us=int(1e6 * (time.perf_counter() - start)))

    def _service(self) -> ServiceClient | None:
        address = self._state.settings().get("address")
        if address is None:
            return None
        if self._client is None or self._client.address != address:
            self._client = ServiceClient(address, recipe=self._spec.recipe.fingerprint, timeout=self._timeout)
        return self._client

    def _own_builder(self) -> Builder:
        if torch.utils.data.get_worker_info() is not None:
            raise ServiceError(
                "a DataLoader worker would load a model of its own; run the loop inside `with sgid.serve(device=...):`, "
                "which shares one model, or pass num_workers=0, or on_miss='original'"
            )
        if self._builder is None:
            self._builder = self._spec.build()
        return self._builder
