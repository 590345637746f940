import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from sgid_transforms.errors import GenerationError
from sgid_transforms.generation.batching import BatchLimit
from sgid_transforms.generation.encoding import LatentCache, LatentCodec, PromptEmbedding, PromptEncoder
from tiny_models import image, kl_vae, sd1, sdxl, tiny_vae


def ask(encoder: PromptEncoder, *texts: str, negative: bool = False) -> list[Any]:
    with torch.no_grad():
        return encoder.get([(text, negative) for text in texts], BatchLimit(4))


def count_texts(pipeline: Any) -> list[int]:
    """Batch sizes that the text encoder meets from now on."""
    sizes: list[int] = []
    pipeline.text_encoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    return sizes


def test_each_distinct_text_is_encoded_once() -> None:
    pipeline = sd1()
    encoder, sizes = PromptEncoder(pipeline, 8), count_texts(pipeline)
    first = ask(encoder, "a cat", "a dog", "a cat", "a cat")
    assert first[0] is first[2] is first[3]
    assert sizes == [2]
    assert ask(encoder, "a dog")[0] is first[1]
    assert sizes == [2]


def test_the_oldest_text_is_forgotten() -> None:
    pipeline = sd1()
    encoder, sizes = PromptEncoder(pipeline, 2), count_texts(pipeline)
    ask(encoder, "one", "two")
    ask(encoder, "one")
    ask(encoder, "three")
    ask(encoder, "one")
    assert len(sizes) == 2
    ask(encoder, "two")
    assert len(sizes) == 3


def test_more_texts_than_the_cache_holds() -> None:
    found = ask(PromptEncoder(sd1(), 2), *"abcdefg")
    assert all(isinstance(item, PromptEmbedding) for item in found)


def test_a_long_text_fails_alone() -> None:
    found = ask(PromptEncoder(sd1(), 8), "short", "x" * 80, "other")
    assert isinstance(found[1], GenerationError)
    assert "takes 82 tokens, the text encoder reads 77" in str(found[1])
    assert isinstance(found[0], PromptEmbedding)
    assert isinstance(found[2], PromptEmbedding)


def test_batching_does_not_change_an_embedding() -> None:
    pipeline = sdxl()
    together = ask(PromptEncoder(pipeline, 8), "a cat", "a long-haired dog on a lawn")
    for i, text in enumerate(("a cat", "a long-haired dog on a lawn")):
        (alone,) = ask(PromptEncoder(pipeline, 8), text)
        torch.testing.assert_close(alone.sequence, together[i].sequence)
        torch.testing.assert_close(alone.pooled, together[i].pooled)


def test_empty_negative_prompt_is_zero_for_sdxl_only_when_negative() -> None:
    encoder = PromptEncoder(sdxl(zeros=True), 8)
    assert not ask(encoder, "", negative=True)[0].sequence.any()
    assert ask(encoder, "")[0].sequence.any()


def test_limits_of_two_tokenizers() -> None:
    pipeline = sdxl()
    pipeline.tokenizer_2.model_max_length = 20
    encoder = PromptEncoder(pipeline, 8)
    assert encoder.max_tokens == 20
    assert encoder.tokenizer is pipeline.tokenizer_2
    assert isinstance(ask(encoder, "x" * 30)[0], GenerationError)


def test_forgetting_all() -> None:
    pipeline = sd1()
    encoder, sizes = PromptEncoder(pipeline, 8), count_texts(pipeline)
    ask(encoder, "a cat")
    encoder.clear()
    ask(encoder, "a cat")
    assert sizes == [1, 1]


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
    noise = torch.randn(point[0].shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(LatentCodec(tiny_vae()).draw(point, noise), LatentCodec(tiny_vae()).draw(point, None))
    noise = torch.randn(posterior[0].shape, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(LatentCodec(kl_vae()).draw(posterior, noise), LatentCodec(kl_vae()).draw(posterior, -noise))


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
        return codec.decode(
            codec.draw(encoded, torch.randn(encoded[0].shape, generator=torch.Generator().manual_seed(0)))[None]
        )


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
