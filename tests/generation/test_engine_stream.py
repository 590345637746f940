"""The engine pulls what waits whenever it has room: batches stay full however the requests come."""

from collections import deque

import pytest
import torch

import tiny_models
from sgid_transforms.generation.engine import NativeEngine
from sgid_transforms.generation.generator import Generator
from sgid_transforms.generation.requests import GenerationRequest
from sgid_transforms.recipe import Filters
from sgid_transforms.service.queue import WantedQueue


@pytest.fixture(scope="module")
def pipeline() -> object:
    return tiny_models.sd1()


def _requests(count: int) -> list[GenerationRequest]:
    strengths = [0.3 + 0.6 * n / (count - 1) for n in range(count)]
    return [tiny_models.request(n, strength=strength, guidance_scale=3.0) for n, strength in enumerate(strengths)]


@pytest.mark.parametrize("at_once", [1, 5, 1000])
def test_batches_are_full_however_requests_come(pipeline: object, at_once: int) -> None:
    """Handed over 16 at a time, and each lot drained before the next began, 128 variants once filled 0.37 of the rows."""
    engine = NativeEngine(pipeline, sampler="ddim", num_inference_steps=10, batch_size=8)
    waiting = deque(_requests(96))

    def pull(room: int) -> list[GenerationRequest]:
        return [waiting.popleft() for _ in range(min(room, at_once, len(waiting)))]

    answered = [request for group in engine.stream(pull) for request, answer in group if isinstance(answer, torch.Tensor)]
    assert len(answered) == len(set(answered)) == 96
    assert engine.stats.fill >= 0.95, engine.stats


def test_the_services_queue_fills_the_batches(pipeline: object) -> None:
    """`max_batch=16` once capped an engine that holds more: 64 requests arrived as 16, 16, 16, 16."""
    engine = NativeEngine(pipeline, sampler="ddim", num_inference_steps=10, batch_size=8)
    requests = {f"k{number}": request for number, request in enumerate(_requests(64))}
    queue = WantedQueue(max_batch=16, max_wait=0.05, max_queue=0)
    from service_fakes import wish

    queue.submit([wish(key) for key in requests])
    assert queue.wait()
    generate = Generator(engine, filters=Filters(max_retries=0))
    done = [
        request
        for group in generate.stream(lambda room: [requests[one.key] for one in queue.pull(room)])
        for request, _ in group
    ]
    assert len(done) == 64
    rows = engine.stats.unet_rows / engine.stats.unet_calls
    assert rows >= 0.95 * 16, f"{rows:.1f} rows per call of 16"


def test_a_stream_gives_what_single_calls_give(pipeline: object) -> None:
    engine = NativeEngine(pipeline, num_inference_steps=4, batch_size=3)
    requests = _requests(7)
    together = engine.run(requests)
    for request, image in zip(requests, together, strict=True):
        (alone,) = engine.run([request])
        assert int((alone.int() - image.int()).abs().max()) <= 1


def test_sizes_that_few_ask_for_are_not_left_waiting(pipeline: object) -> None:
    """With an endless stream of one size, a request of another size must still be served."""
    engine = NativeEngine(pipeline, num_inference_steps=4, batch_size=2)
    odd = tiny_models.request(99, image=tiny_models.image(99, 32, 64), strength=0.5)
    served = 0
    waiting = deque([odd])

    def pull(room: int) -> list[GenerationRequest]:
        while len(waiting) < room:
            waiting.append(tiny_models.request(len(waiting), strength=0.5))
        return [waiting.popleft() for _ in range(room)]

    for group in engine.stream(pull):
        served += len(group)
        if any(request is odd for request, _ in group):
            break
        assert served < 200
