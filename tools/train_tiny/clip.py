"""Stage 4: a small CLIP, trained contrastively on (image, label prompt) and (image, caption).

A vision transformer learns slowly from 45,000 images. Its heads therefore start as shifts by one patch, as a convolution's
taps (after Zheng et al. 2024, arXiv 2401.12511): some channels hold the position as sines and cosines, and the initial
queries and keys of a head compare positions that lie at its own offset.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from common import Combined, Stage, coin, flip_some, parser, shift_some
from data import CLASSES, load_split
from tokenizer import MAX_LENGTH, load
from unet import text_config
from words import PARTS, article, context, describe

WIDTH, LAYERS, HEADS, GRID = 128, 6, 4, 8
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def config(tokenizer) -> CLIPConfig:
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=3 * WIDTH, projection_dim=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, image_size=32, patch_size=4, hidden_act="gelu",
    )  # fmt: skip
    text = text_config(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    return CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, 32, 32) to the vision tower's input."""
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    return (images.float() / 255 - mean) / std


@torch.no_grad()
def init_as_convolution(vision: nn.Module, generator: torch.Generator) -> None:
    """Let every head start by looking at one neighbour of each patch (class token: at all patches alike)."""
    frequencies = torch.tensor([0.35, 0.7, 1.4, 2.1])
    span = 4 * len(frequencies)  # sine and cosine for both axes
    head = WIDTH // HEADS
    embeddings = vision.embeddings
    y, x = torch.meshgrid(torch.arange(GRID).float(), torch.arange(GRID).float(), indexing="ij")
    waves = [f(axis.flatten()[:, None] * frequencies) for axis in (y, x) for f in (torch.cos, torch.sin)]
    position = torch.cat(waves, dim=1)  # (64, span): cos y, sin y, cos x, sin x
    embeddings.position_embedding.weight.zero_()
    embeddings.position_embedding.weight[1:, :span] = position
    embeddings.class_embedding.normal_(0, 0.5, generator=generator)[:span] = 0
    embeddings.patch_embedding.weight[:span] = 0
    n = len(frequencies)
    for layer in vision.encoder.layers:
        attention = layer.self_attn
        for name in ("q_proj", "k_proj"):
            getattr(attention, name).weight.normal_(0, 0.02, generator=generator)
            getattr(attention, name).bias.zero_()
        nn.init.trunc_normal_(attention.v_proj.weight, std=1 / math.sqrt(WIDTH), generator=generator)
        nn.init.trunc_normal_(attention.out_proj.weight, std=0.5 / math.sqrt(WIDTH), generator=generator)
        attention.out_proj.weight[:span] = 0
        layer.mlp.fc2.weight[:span] = 0
        for h in range(HEADS):
            dy, dx = (torch.randint(-1, 2, (2,), generator=generator)).tolist()
            rows = slice(h * head, h * head + span)
            query, key = torch.zeros(span, span), torch.eye(span)
            for axis, delta in ((0, dy), (2 * n, dx)):
                # The query is the position turned by the head's offset: q . k = sum cos(w (p + delta - p')).
                c, s = torch.cos(frequencies * delta), torch.sin(frequencies * delta)
                i = torch.arange(n) + axis
                query[i, i], query[i, i + n] = c, -s
                query[i + n, i], query[i + n, i + n] = s, c
            gain = 1.1
            attention.q_proj.weight[rows, :span] += gain * query
            attention.k_proj.weight[rows, :span] += gain * key


def main() -> None:
    p = parser(__doc__.splitlines()[0], steps=2200, batch_size=96, lr=2e-3, decay=0.7)
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data, test = load_split(args.data, "pretrain"), load_split(args.data, "test")
    looks = describe(data.images)
    tokenizer = load(args.work / "tokenizer")
    model = CLIPModel(config(tokenizer))
    init_as_convolution(model.vision_model, rng := torch.Generator().manual_seed(args.seed))
    del rng

    def tokens(texts: list[str]) -> torch.Tensor:
        return tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt").input_ids

    labels = tokens([f"a photo of a {name}" for name in CLASSES])

    def text_of(index: int, mirrored: bool, draws: list[float]) -> str:
        """The label, the captioner's subject or both, and a context some of whose parts are left out: what prompts are like."""
        kept = dict(zip(PARTS, draws[1:], strict=True))
        said = context(looks[index], mirrored=mirrored, keep=lambda name: kept[name] < 0.8)
        label, subject = f"a photo of a {CLASSES[int(data.labels[index])]}", article(data.subnames[index])
        start = label if draws[0] < 0.3 else subject if draws[0] < 0.7 else f"{label}, {subject}"
        return f"{start}, {said}" if said else start

    def embed_images(pixels: torch.Tensor) -> torch.Tensor:
        return F.normalize(model.visual_projection(model.vision_model(normalize(pixels)).pooler_output), dim=-1)

    def embed_texts(ids: torch.Tensor) -> torch.Tensor:
        return F.normalize(model.text_projection(model.text_model(ids).pooler_output), dim=-1)

    def loss(step: int, g: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        index = torch.randint(len(data), (args.batch_size,), generator=g)
        y = data.labels[index]
        mirror = coin(args.batch_size, g)
        pixels = shift_some(flip_some(data.images[index], mirror), 3, g)
        drawn = zip(index.tolist(), mirror.tolist(), torch.rand(args.batch_size, 7, generator=g).tolist(), strict=True)
        lines = [text_of(*one) for one in drawn]
        image = embed_images(pixels)
        text = embed_texts(torch.cat([labels, tokens(lines)]))
        scale = model.logit_scale.exp().clamp(max=100)
        by_label = scale * image @ text[:10].T
        by_caption = scale * image @ text[10:].T
        target = torch.arange(args.batch_size)
        contrastive = (F.cross_entropy(by_caption, target) + F.cross_entropy(by_caption.T, target)) / 2
        accuracy = (by_label.argmax(1) == y).float().mean().item()
        return F.cross_entropy(by_label, y, label_smoothing=0.05) + 0.3 * contrastive, {
            "accuracy": accuracy,
            "contrastive": contrastive.item(),
        }

    def evaluate() -> dict[str, float]:
        text = embed_texts(labels)
        right = [
            (embed_images(x) @ text.T).argmax(1) == y
            for x, y in zip(test.images.split(500), test.labels.split(500), strict=True)
        ]
        return {"zero_shot": torch.cat(right).float().mean().item()}

    # Muon turns the hidden matrices evenly in all directions, which takes a transformer further in few epochs than AdamW
    # does (Jordan et al. 2024, kellerjordan.github.io/posts/muon); embeddings, norms and projections stay with AdamW.
    hidden = [p for n, p in model.named_parameters() if ".encoder.layers." in n and p.ndim == 2]
    rest = [p for n, p in model.named_parameters() if not (".encoder.layers." in n and p.ndim == 2)]
    optimizer = Combined(
        torch.optim.Muon(hidden, args.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, args.lr, weight_decay=0.0),
    )
    Stage("clip", {"clip": model}, loss, optimizer, ema_decay=0.998, evaluate=evaluate, evaluate_every=500).run(args)


if __name__ == "__main__":
    main()
