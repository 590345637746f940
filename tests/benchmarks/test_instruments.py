"""The benchmarks' instruments, on made-up work whose cost is known."""

import time

import instruments
import pytest
import torch

from pretended import PretendedDevice
from sgid_transforms import VariantStore


def test_a_stopwatch_counts_each_call_to_its_stage(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))  # each look at the clock takes a second
    watch = instruments.Stopwatch("cpu")
    network = torch.nn.Identity()
    watch.watch("denoise", network)
    for _ in range(3):
        network(torch.zeros(1))
    with watch.counting_calls("store", VariantStore, "count"), watch.counting("filter"):
        assert VariantStore("nowhere").count() == 0
    assert watch.take() == {"denoise": 3.0, "store": 1.0, "filter": 3.0}
    assert watch.take() == {}
    assert VariantStore("nowhere").count() == 0
    assert watch.take() == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real device would take the place of the pretended one")
def test_on_an_accelerator_networks_are_timed_by_events_and_copies_are_counted():
    with PretendedDevice("cuda") as device:
        network = torch.nn.Identity()
        watch = instruments.Stopwatch("cuda")
        watch.watch("denoise", network)
        with instruments.Copies() as copies:
            there = torch.ones(2).to("cuda")
            network(there + there)
            there.cpu()
            torch.ones(2).copy_(there)
        before = len(device.events)
        assert set(watch.take()) == {"denoise"}
        assert device.counts(before) == {("event", True): 1}  # one wait for all calls
        assert (copies.there, copies.back) == (1, 2)
        assert instruments.idle_share(lambda: network(there), "cuda") is None


def test_flops_count_products_convolutions_and_attention_in_its_parts():
    one, other = torch.ones(2, 3), torch.ones(3, 5)
    assert instruments.flops(lambda: one @ other) == 2 * 2 * 3 * 5
    assert instruments.flops(lambda: torch.nn.Conv2d(3, 4, 1)(torch.ones(1, 3, 8, 8))) == 2 * 3 * 4 * 64
    query = torch.ones(1, 2, 16, 8)
    work = instruments.flops(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query))
    assert work == 2 * (2 * 2 * 16 * 16 * 8)


def test_the_peak_is_the_fastest_product(monkeypatch):
    now = iter([0.0, 0.0, 0.0, 4.0, 4.0, 6.0, 9.0])  # stop at 0.5 s: the first product counts, however long it takes
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    assert instruments.peak_flops("cpu", torch.float32, side=8) == 2 * 8**3


def test_idle_time_is_what_no_span_covers():
    assert instruments.covered([(0, 2), (1, 3), (5, 6), (5.5, 5.75)]) == 4
    assert instruments.covered([]) == 0
    assert instruments.idle_share(lambda: None, "cpu") is None


def test_memory_and_name_of_a_cpu():
    assert instruments.peak_memory("cpu") > 50  # MiB: torch alone is larger
    assert instruments.device_name("cpu") == f"CPU, {torch.get_num_threads()} threads"
