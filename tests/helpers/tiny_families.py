"""Every image-to-image pipeline family of diffusers that runs through the adapter, tiny and with random weights.

`FAMILIES` maps the family's name in diffusers' `AUTO_IMAGE2IMAGE_PIPELINES_MAPPING` to a function that builds the
pipeline. Widths are the smallest that the architecture allows, so that all of them together stay a matter of seconds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import torch

import tiny_models
import tiny_text as text
from tiny_models import XL_CONDITION
from tiny_text import WIDTH


def _vae(channels: int = 4, *, blocks: int = 1, **options: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=32,
        **options,
    ).eval()


def _flow_vae(channels: int) -> Any:
    return _vae(channels, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5)


def _unet(cross: int = WIDTH, **options: Any) -> Any:
    small: dict[str, Any] = {"block_out_channels": (8, 16), "attention_head_dim": 2, "norm_num_groups": 2}
    return tiny_models.unet(cross, **small | options)


def _flow() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def _sd_parts(**unet: Any) -> dict[str, Any]:
    return {
        "vae": _vae(blocks=2),
        "text_encoder": text.clip_text_encoder(),
        "tokenizer": text.clip_tokenizer(),
        "unet": _unet(**unet),
        "scheduler": tiny_models.ddim(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _xl_parts() -> dict[str, Any]:
    return {
        "vae": _vae(blocks=2),
        "text_encoder": text.clip_text_encoder(),
        "tokenizer": text.clip_tokenizer(),
        "text_encoder_2": text.clip_text_encoder(projection=True),
        "tokenizer_2": text.clip_tokenizer(),
        "unet": _unet(2 * WIDTH, **XL_CONDITION),
        "scheduler": tiny_models.ddim(),
        "add_watermarker": False,
    }


def _xl_controlnet(*, union: bool = False) -> Any:
    return _controlnet(2 * WIDTH, union=union, **XL_CONDITION)


def _controlnet(cross: int, *, union: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "cross_attention_dim": cross,
        "attention_head_dim": 2,
        "norm_num_groups": 2,
        "conditioning_embedding_out_channels": (8, 8),
    }
    if union:
        settings |= {
            "num_control_type": 8,
            "num_trans_channel": 8,
            "num_trans_head": 2,
            "num_trans_layer": 1,
            "num_proj_channel": 8,
        }
    return (diffusers.ControlNetUnionModel if union else diffusers.ControlNetModel)(**settings | options).eval()


def _sd3_parts() -> dict[str, Any]:
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
    )
    return {
        "transformer": transformer.eval(),
        "scheduler": _flow(),
        "vae": _flow_vae(4),
        "text_encoder": text.clip_text_encoder(projection=True),
        "tokenizer": text.clip_tokenizer(),
        "text_encoder_2": text.clip_text_encoder(projection=True),
        "tokenizer_2": text.clip_tokenizer(),
        "text_encoder_3": text.t5_text_encoder(2 * WIDTH),
        "tokenizer_3": text.t5_tokenizer(),
    }


def deepfloyd_if() -> Any:
    unet = _unet(
        sample_size=32,
        in_channels=3,
        out_channels=6,
        cross=32,  # fixed by the group norm of 32 groups that follows
        block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        encoder_hid_dim=WIDTH,
        attention_head_dim=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
    )
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True)
    return diffusers.IFImg2ImgPipeline(
        tokenizer=text.t5_tokenizer(77),
        text_encoder=text.t5_text_encoder(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )


def _movq() -> Any:
    torch.manual_seed(0)
    return diffusers.VQModel(
        block_out_channels=(32, 32),  # spatial norms have 32 groups
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    ).eval()


def _kandinsky_prior() -> dict[str, Any]:
    torch.manual_seed(0)
    prior = diffusers.PriorTransformer(num_attention_heads=2, attention_head_dim=8, embedding_dim=WIDTH, num_layers=1)
    prior.clip_std.data.fill_(1.0)  # zero by default, which would make every image embedding zero
    return {
        "prior_prior": prior.eval(),
        "prior_image_encoder": text.clip_vision_encoder(),
        "prior_text_encoder": text.clip_text_encoder(projection=True),
        "prior_tokenizer": text.clip_tokenizer(),
        "prior_scheduler": diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
        ),
        "prior_image_processor": text.clip_image_processor(),
    }


def _kandinsky_unet(condition: str) -> Any:
    return _unet(
        in_channels=4,
        out_channels=8,
        block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type=f"{condition}_proj",
        addition_embed_type=condition,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
        class_embed_type=None,
    )


def kandinsky() -> Any:
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False)
    return diffusers.KandinskyImg2ImgCombinedPipeline(
        text_encoder=text.multilingual_clip(),
        tokenizer=text.xlm_roberta_tokenizer(),
        unet=_kandinsky_unet("text_image"),
        scheduler=scheduler,
        movq=_movq(),
        **_kandinsky_prior(),
    )


def kandinsky22() -> Any:
    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False)
    return diffusers.KandinskyV22Img2ImgCombinedPipeline(
        unet=_kandinsky_unet("image"), scheduler=scheduler, movq=_movq(), **_kandinsky_prior()
    )


def kandinsky3() -> Any:
    torch.manual_seed(0)
    unet = diffusers.Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(8, 16),
        cross_attention_dim=4,
        encoder_hid_dim=WIDTH,
    )
    return diffusers.Kandinsky3Img2ImgPipeline(
        tokenizer=text.t5_tokenizer(128),
        text_encoder=text.t5_text_encoder(),
        unet=unet.eval(),
        scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", steps_offset=1),
        movq=_movq(),
    )


FLUX_SHAPE: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 1,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "axes_dims_rope": (4, 4, 8),
}


def _flux_parts(**options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "scheduler": _flow(),
        "vae": _flow_vae(4),
        "text_encoder": text.clip_text_encoder(),
        "tokenizer": text.clip_tokenizer(),
        "text_encoder_2": text.t5_text_encoder(),
        "tokenizer_2": text.t5_tokenizer(),
        "transformer": diffusers.FluxTransformer2DModel(**FLUX_SHAPE | {"guidance_embeds": True} | options).eval(),
    }


def flux_controlnet() -> Any:
    with warnings.catch_warnings():  # diffusers' own use of a name that it has moved
        warnings.filterwarnings("ignore", message="`FluxPosEmbed` is deprecated", category=FutureWarning)
        control = diffusers.FluxControlNetModel(**FLUX_SHAPE, guidance_embeds=True)
    return diffusers.FluxControlNetImg2ImgPipeline(**_flux_parts(), controlnet=control.eval())


def _flux2_parts(guidance: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=2,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )
    return {"scheduler": _flow(), "vae": vae.eval(), "transformer": transformer.eval()}


def _qwen_parts(levels: int = 2, base_dim: int = 8) -> dict[str, Any]:
    torch.manual_seed(0)
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=base_dim,
        z_dim=4,
        dim_mult=[1] * (levels + 1),
        num_res_blocks=1,
        temperal_downsample=[False] * levels,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return {
        "transformer": transformer.eval(),
        "vae": vae.eval(),
        "scheduler": _flow(),
        "text_encoder": text.qwen_vl_text_encoder(),
        "tokenizer": text.qwen_tokenizer(),
    }


def z_image() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=1,
        n_kv_heads=1,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[640, 32, 32],
    )
    return diffusers.ZImageImg2ImgPipeline(
        scheduler=_flow(),
        vae=_flow_vae(4),
        text_encoder=text.qwen3_text_encoder(causal=False),
        tokenizer=text.qwen_tokenizer(),
        transformer=transformer.eval(),
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    "stable-diffusion-3": lambda: diffusers.StableDiffusion3Img2ImgPipeline(**_sd3_parts()),
    "stable-diffusion-3-pag": lambda: diffusers.StableDiffusion3PAGImg2ImgPipeline(
        **_sd3_parts(), pag_applied_layers="blocks.0"
    ),
    "if": deepfloyd_if,
    "kandinsky": kandinsky,
    "kandinsky22": kandinsky22,
    "kandinsky3": kandinsky3,
    "stable-diffusion-controlnet": lambda: diffusers.StableDiffusionControlNetImg2ImgPipeline(
        **_sd_parts(), controlnet=_controlnet(WIDTH)
    ),
    "stable-diffusion-pag": lambda: diffusers.StableDiffusionPAGImg2ImgPipeline(**_sd_parts(), pag_applied_layers="mid"),
    "stable-diffusion-xl-controlnet": lambda: diffusers.StableDiffusionXLControlNetImg2ImgPipeline(
        **_xl_parts(), controlnet=_xl_controlnet()
    ),
    "stable-diffusion-xl-controlnet-union": lambda: diffusers.StableDiffusionXLControlNetUnionImg2ImgPipeline(
        **_xl_parts(), controlnet=_xl_controlnet(union=True)
    ),
    "stable-diffusion-xl-pag": lambda: diffusers.StableDiffusionXLPAGImg2ImgPipeline(**_xl_parts(), pag_applied_layers="mid"),
    "stable-diffusion-xl-controlnet-pag": lambda: diffusers.StableDiffusionXLControlNetPAGImg2ImgPipeline(
        **_xl_parts(), controlnet=_xl_controlnet(), pag_applied_layers="mid"
    ),
    "flux": lambda: diffusers.FluxImg2ImgPipeline(**_flux_parts()),
    "flux-controlnet": flux_controlnet,
    # the control image's latents are concatenated to the input's channels
    "flux-control": lambda: diffusers.FluxControlImg2ImgPipeline(**_flux_parts(in_channels=32, out_channels=16)),
    "flux-kontext": lambda: diffusers.FluxKontextPipeline(**_flux_parts()),
    "flux2": lambda: diffusers.Flux2Pipeline(
        **_flux2_parts(True), text_encoder=text.mistral_text_encoder(), tokenizer=text.mistral_tokenizer()
    ),
    "flux2-klein": lambda: diffusers.Flux2KleinPipeline(
        **_flux2_parts(False), text_encoder=text.qwen3_text_encoder(causal=True), tokenizer=text.qwen_tokenizer()
    ),
    "qwenimage": lambda: diffusers.QwenImageImg2ImgPipeline(**_qwen_parts()),
    # These two scale their input to a megapixel whatever the output's size is: five levels keep the sequence short.
    "qwenimage-edit": lambda: diffusers.QwenImageEditPipeline(**_qwen_parts(5, 4), processor=text.qwen_vl_processor()),
    "qwenimage-edit-plus": lambda: diffusers.QwenImageEditPlusPipeline(**_qwen_parts(5, 4), processor=text.qwen_vl_processor()),
    "z-image": z_image,
}
