"""Plain DistributedDataParallel with two gloo ranks on one machine."""

import json
from pathlib import Path

import pytest
import torch

from augment_fakes import batches, image_folder
from sgid_transforms.variants.store import VariantStore


def test_two_ranks_share_captions_store_and_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ddp_ranks

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # the machine's own name need not resolve

    image_folder(tmp_path / "data")
    torch.multiprocessing.spawn(ddp_ranks.train, args=(tmp_path,), nprocs=2)
    reports = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert (tmp_path / "captioned").read_text().split() == ["12"]  # prepared once
    assert reports[0]["pid"] == reports[1]["pid"]
    assert sorted(report["owner"] for report in reports) == [False, True]
    assert [report["seen"] for report in reports] == [12, 12]
    stored = VariantStore(tmp_path / "variants").count()
    assert sum(batches(tmp_path / "generated")) == stored  # nothing twice
    made = [report["made"] for report in reports]
    assert all(made)  # each rank counts what was made for it: they once all landed on the owner's
    assert sum(made) == stored
    assert stored + sum(report["hits"] for report in reports) >= 24
