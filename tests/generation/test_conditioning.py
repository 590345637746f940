from typing import Any

import pytest
import torch

from sgid_transforms.errors import GenerationError
from sgid_transforms.generation.batching import BatchLimit
from sgid_transforms.generation.conditioning import PromptEmbedding, PromptEncoder, guidance_embedding, time_ids
from tiny_models import lcm, sd1, sdxl


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
    assert encoder.encoded == 2


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


@pytest.mark.parametrize("dim", [16, 17])
def test_guidance_embedding_equals_diffusers(dim: int) -> None:
    scales = torch.tensor([1.0, 4.5, 8.0])
    expected = lcm().get_guidance_scale_embedding(scales - 1, embedding_dim=dim)
    torch.testing.assert_close(guidance_embedding(scales, dim), expected, atol=1e-5, rtol=0)


def test_time_ids() -> None:
    assert time_ids((512, 768), aesthetic=False, negative=True) == (512, 768, 0, 0, 512, 768)
    assert time_ids((512, 768), aesthetic=True, negative=False) == (512, 768, 0, 0, 6.0)
    assert time_ids((512, 768), aesthetic=True, negative=True) == (512, 768, 0, 0, 2.5)
