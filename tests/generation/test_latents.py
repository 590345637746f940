import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from sgid_transforms.generation.latents import LatentCache, LatentCodec
from tiny_models import image, kl_vae, tiny_vae


def pixels(*seeds: int) -> torch.Tensor:
    return torch.stack([image(seed) for seed in seeds]).float() / 255


@pytest.fixture(params=[kl_vae, tiny_vae], ids=["kl", "tiny"])
def vae(request: pytest.FixtureRequest) -> Any:
    return request.param()


def test_batched_encoding_equals_one_by_one(vae: Any) -> None:
    codec = LatentCodec(vae, torch.channels_last)
    with torch.no_grad():
        together = codec.encode(pixels(1, 2, 3))
        alone = [codec.encode(pixels(seed))[0] for seed in (1, 2, 3)]
    for one, other in zip(together, alone, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b)


def test_only_a_variational_encoder_draws() -> None:
    with torch.no_grad():
        (posterior,) = LatentCodec(kl_vae()).encode(pixels(1))
        (point,) = LatentCodec(tiny_vae()).encode(pixels(1))
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    LatentCodec(tiny_vae()).draw(point, generator)
    assert torch.equal(generator.get_state(), before)
    LatentCodec(kl_vae()).draw(posterior, generator)
    assert not torch.equal(generator.get_state(), before)


def test_scaling_is_undone_by_decoding(vae: Any) -> None:
    """Latents scaled by any factor, or by statistics, decode to the same picture."""
    pictures = []
    for factor in (1.0, 0.18215):
        vae.register_to_config(scaling_factor=factor)
        pictures.append(vae_round_trip(vae))
    vae.register_to_config(latents_mean=[0.2] * vae.config.latent_channels, latents_std=[1.3] * vae.config.latent_channels)
    pictures.append(vae_round_trip(vae))
    torch.testing.assert_close(pictures[0], pictures[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(pictures[0], pictures[2], atol=1e-5, rtol=0)


def vae_round_trip(vae: Any) -> torch.Tensor:
    codec = LatentCodec(vae)
    with torch.no_grad():
        (encoded,) = codec.encode(pixels(1))
        return codec.decode(codec.draw(encoded, torch.Generator().manual_seed(0))[None])


def test_work_is_counted(vae: Any) -> None:
    codec = LatentCodec(vae, torch.channels_last)
    with torch.no_grad():
        encoded = codec.encode(pixels(1, 2, 3))
        codec.decode(torch.stack([codec.draw(e, torch.Generator()) for e in encoded[:2]]))
    assert (codec.encoded, codec.decoded) == (3, 2)


def test_cache_gives_back_what_was_put(vae: Any, tmp_path: Path) -> None:
    cache = LatentCache(tmp_path / "latents", vae)
    key = cache.key(image(1), (32, 32))
    assert cache.get(key, "cpu") is None
    with torch.no_grad():
        batch = LatentCodec(vae).encode(pixels(1, 2))
    cache.put(key, batch[0])
    found = cache.get(key, "cpu")
    assert found is not None
    for a, b in zip(found, batch[0], strict=True):
        assert torch.equal(a, b)
    assert cache.hits == 1
    (file,) = (tmp_path / "latents").rglob("*.safetensors")
    assert file.stat().st_size < sum(t.nbytes for t in batch[0]) + 500, "the whole batch was written with its entry"


def test_cache_key_covers_pixels_shape_size_and_weights(tmp_path: Path) -> None:
    vae = kl_vae()
    cache = LatentCache(tmp_path, vae)
    flat = torch.zeros(3, 4, 8, dtype=torch.uint8)
    keys = {
        cache.key(image(1), (32, 32)),
        cache.key(image(2), (32, 32)),
        cache.key(image(1), (64, 32)),
        cache.key(flat, (32, 32)),
        cache.key(flat.view(3, 8, 4), (32, 32)),
        LatentCache(tmp_path, tiny_vae()).key(image(1), (32, 32)),
    }
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] += 1
    keys.add(LatentCache(tmp_path, vae).key(image(1), (32, 32)))
    assert len(keys) == 7
    same = kl_vae().to(memory_format=torch.channels_last)
    assert LatentCache(tmp_path, same).key(image(1), (32, 32)) in keys


@pytest.mark.parametrize("damage", [b"", b"not safetensors", b"\xff" * 200])
def test_a_damaged_file_is_a_miss(damage: bytes, tmp_path: Path) -> None:
    cache = LatentCache(tmp_path, tiny_vae())
    cache.put("ab12", (torch.ones(3),))
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(damage)
    assert cache.get("ab12", "cpu") is None
    assert cache.hits == 0
    cache.put("ab12", (torch.ones(3),))
    assert cache.get("ab12", "cpu") is not None


def test_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    vae = tiny_vae()
    threads = [
        threading.Thread(target=lambda i=i: LatentCache(tmp_path, vae).put("cd34", (torch.full((500,), float(i)),)))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = LatentCache(tmp_path, vae).get("cd34", "cpu")
    assert found is not None
    assert len(set(found[0].tolist())) == 1
    assert [path.name for path in (tmp_path / "cd").iterdir()] == ["cd34.safetensors"]
