"""Tokenizers and text encoders with random weights, built in place: no download, a few kilobytes each.

Shared by the tests of the native engine, of the adapters and of the filters. All of them read single characters or
bytes, so that any prompt is representable and the vocabulary stays tiny.
"""

from __future__ import annotations

import string
from typing import Any

import torch
import transformers

WIDTH = 16
LETTERS = string.ascii_lowercase + string.digits + ",.-' !"


def clip_tokenizer(max_length: int = 77) -> Any:
    """A CLIP tokenizer over single characters."""
    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    return transformers.CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=max_length
    )


def clip_text_config(width: int = WIDTH, layers: int = 2, max_length: int = 77) -> Any:
    return transformers.CLIPTextConfig(
        vocab_size=len(clip_tokenizer()),
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_attention_heads=2,
        num_hidden_layers=layers,
        max_position_embeddings=max_length,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def clip_text_encoder(width: int = WIDTH, *, projection: bool = False) -> Any:
    torch.manual_seed(0)
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(
        clip_text_config(width)
    ).eval()


def clip_vision_encoder(width: int = WIDTH, size: int = 32) -> Any:
    torch.manual_seed(0)
    return transformers.CLIPVisionModelWithProjection(clip_vision_config(width, size)).eval()


def clip_vision_config(width: int = WIDTH, size: int = 32) -> Any:
    return transformers.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_attention_heads=2,
        num_hidden_layers=1,
        image_size=size,
        patch_size=8,
    )


def clip_image_processor(size: int = 32) -> Any:
    return transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def t5_tokenizer(max_length: int = 48) -> Any:
    """A T5 (Unigram) tokenizer over single characters."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=max_length)


def t5_text_encoder(width: int = WIDTH) -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=width, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config).eval()


QWEN_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
QWEN_CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def byte_vocabulary(special: list[str]) -> dict[str, int]:
    from tokenizers.pre_tokenizers import ByteLevel

    return {token: i for i, token in enumerate([*special, *sorted(ByteLevel.alphabet())])}


def qwen_tokenizer() -> Any:
    """A Qwen2 tokenizer over single bytes, with the chat and vision tokens that the pipelines' templates use."""
    tokenizer = transformers.Qwen2Tokenizer(vocab=byte_vocabulary(QWEN_SPECIAL), merges=[], chat_template=QWEN_CHAT)
    tokenizer.add_special_tokens({"additional_special_tokens": QWEN_SPECIAL[1:]})
    return tokenizer


def qwen3_text_encoder(*, causal: bool) -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=len(qwen_tokenizer()),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    return (transformers.Qwen3ForCausalLM if causal else transformers.Qwen3Model)(config).eval()


def qwen_vl_text_encoder() -> Any:
    torch.manual_seed(0)
    special = {token: i for i, token in enumerate(QWEN_SPECIAL)}
    text = {
        "vocab_size": len(qwen_tokenizer()),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    vision = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2, "out_hidden_size": WIDTH}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=special["<|image_pad|>"],
        video_token_id=special["<|video_pad|>"],
        vision_start_token_id=special["<|vision_start|>"],
        vision_end_token_id=special["<|vision_end|>"],
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen_vl_processor() -> Any:
    """The processor of the Qwen editing pipelines, with images cut down to 2 x 2 merged patches."""
    images = transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56)
    return transformers.Qwen2VLProcessor(
        image_processor=images, tokenizer=qwen_tokenizer(), video_processor=transformers.Qwen2VLVideoProcessor()
    )


MISTRAL_SPECIAL = ["<s>", "</s>", "<pad>", "<unk>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
MISTRAL_CHAT = "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"


def mistral_tokenizer() -> Any:
    """What FLUX.2 calls its tokenizer: anything with `apply_chat_template` over text parts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=byte_vocabulary(MISTRAL_SPECIAL), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=MISTRAL_CHAT,
    )


def mistral_text_encoder() -> Any:
    torch.manual_seed(0)
    text = {
        "model_type": "mistral",
        "vocab_size": len(mistral_tokenizer()),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "sliding_window": None,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=4)
    return transformers.Mistral3ForConditionalGeneration(config).eval()


def xlm_roberta_tokenizer() -> Any:
    """The multilingual (Unigram) tokenizer of Kandinsky 2.1, over single characters."""
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    vocab = [*special, ("▁", -2.0), *((letter, -3.0) for letter in LETTERS), ("<mask>", 0.0)]
    return transformers.XLMRobertaTokenizer(vocab=vocab, model_max_length=77)


def multilingual_clip(width: int = WIDTH) -> Any:
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    torch.manual_seed(0)
    config = MCLIPConfig(
        transformerDimSize=width,
        imageDimSize=width,
        vocab_size=len(xlm_roberta_tokenizer()),
        hidden_size=width,
        intermediate_size=width,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=96,
    )
    return MultilingualCLIP(config).eval()


def clip_model(width: int = WIDTH, size: int = 32) -> Any:
    """A whole CLIP (image and text tower) with random weights."""
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=clip_text_config(width).to_dict(),
        vision_config=clip_vision_config(width, size).to_dict(),
        projection_dim=width,
    )
    return transformers.CLIPModel(config).eval()


def clip_processor(size: int = 32) -> Any:
    return transformers.CLIPProcessor(image_processor=clip_image_processor(size), tokenizer=clip_tokenizer())


def safety_checker(*, flags: bool) -> Any:
    """Stable Diffusion's safety checker, which flags every image or none."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(
        transformers.CLIPConfig(vision_config=clip_vision_config().to_dict(), projection_dim=WIDTH)
    ).eval()
    for thresholds in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        thresholds.data.fill_(-2.0 if flags else 2.0)  # below, or above, any cosine
    return checker
