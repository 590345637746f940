"""Stage 5: a small BLIP captioner, whose vision tower starts as the trained CLIP's.

It learns to say from pixels alone what the training captions say, the sub-category and the context, and to go on from a label
that it is given ("a photo of a cat") with the context alone.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipTextConfig, BlipVisionConfig

import clip as clip_stage
from clip import normalize
from common import Combined, Stage, averaged, coin, flip_some, parser, shift_some
from data import CLASSES, load_split
from words import COLOURS, PLACES, article, context, describe

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
MAX_LENGTH = 40


def vocabulary(lines: list[str]) -> list[str]:
    """Special tokens, then the words of all captions, then letters and their continuations: anything has a spelling."""
    words = sorted(
        {word for line in lines for word in re.findall(r"[a-z]+|[^\sa-z]", line.lower())}
        | set(COLOURS)
        | set(CLASSES)
        | set(PLACES)
    )
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    return list(dict.fromkeys([*SPECIAL, *words, *letters, *(f"##{c}" for c in letters)]))


def tokenizer_from(folder: Path) -> BertTokenizer:
    words = (folder / "vocab.txt").read_text().splitlines()
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=MAX_LENGTH)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def config(tokenizer: BertTokenizer) -> BlipConfig:
    vision = BlipVisionConfig(
        hidden_size=clip_stage.WIDTH, intermediate_size=3 * clip_stage.WIDTH, num_hidden_layers=clip_stage.LAYERS,
        num_attention_heads=clip_stage.HEADS, image_size=32, patch_size=4, hidden_act="gelu",
    )  # fmt: skip
    special = {"bos_token_id": "[DEC]", "sep_token_id": "[SEP]", "eos_token_id": "[SEP]", "pad_token_id": "[PAD]"}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in special.items()}
    text = BlipTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, encoder_hidden_size=clip_stage.WIDTH, intermediate_size=384,
        projection_dim=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=MAX_LENGTH,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, label_smoothing=0.05, **ids,
    )  # fmt: skip
    return BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128)


@torch.no_grad()
def start_from_clip(vision: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Copy CLIP's vision tower into BLIP's, whose queries, keys and values are one matrix and which has no first norm."""
    own = vision.state_dict()
    prefix = "vision_model."
    source = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    own["embeddings.class_embedding"].copy_(source["embeddings.class_embedding"].view(1, 1, -1))
    own["embeddings.position_embedding"].copy_(source["embeddings.position_embedding.weight"][None])
    own["embeddings.patch_embedding.weight"].copy_(source["embeddings.patch_embedding.weight"])
    own["post_layernorm.weight"].copy_(source["post_layernorm.weight"])
    own["post_layernorm.bias"].copy_(source["post_layernorm.bias"])
    for i in range(clip_stage.LAYERS):
        for kind in ("weight", "bias"):
            qkv = [source[f"encoder.layers.{i}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            own[f"encoder.layers.{i}.self_attn.qkv.{kind}"].copy_(torch.cat(qkv))
            own[f"encoder.layers.{i}.self_attn.projection.{kind}"].copy_(
                source[f"encoder.layers.{i}.self_attn.out_proj.{kind}"]
            )
            for part in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"):
                own[f"encoder.layers.{i}.{part}.{kind}"].copy_(source[f"encoder.layers.{i}.{part}.{kind}"])
    vision.load_state_dict(own)


def main() -> None:
    p = parser(__doc__.splitlines()[0], steps=1400, batch_size=64, lr=1e-3, decay=0.7)
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data = load_split(args.data, "pretrain")
    looks = describe(data.images)
    # Of each picture and of its mirror image: one word, the side, differs.
    contexts = [[context(look, mirrored=mirrored) for look in looks] for mirrored in (False, True)]
    labels = [f"a photo of {article(name)}, " for name in CLASSES]
    subjects = [f"{article(name)}, " for name in data.subnames]
    args.work.mkdir(parents=True, exist_ok=True)
    folder = args.work / "captioner_tokenizer"
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary([*labels, *subjects, *contexts[0]])) + "\n")
    tokenizer = tokenizer_from(folder)
    model = BlipForConditionalGeneration(config(tokenizer))
    start_from_clip(model.vision_model, averaged(args.work, "clip")["clip"])
    start_token = tokenizer.convert_tokens_to_ids("[DEC]")
    lengths = {label: len(tokenizer(label.removesuffix(", ")).input_ids) - 1 for label in labels}

    def loss(step: int, g: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        index = torch.randint(len(data), (args.batch_size,), generator=g)
        mirror, given = coin(args.batch_size, g), coin(args.batch_size, g).tolist()
        pixels = shift_some(flip_some(data.images[index], mirror), 2, g)
        pairs = list(zip(index.tolist(), mirror.tolist(), strict=True))
        starts = [labels[int(data.labels[i])] if prefix else subjects[i] for (i, _), prefix in zip(pairs, given, strict=True)]
        lines = [start + contexts[mirrored][i] for start, (i, mirrored) in zip(starts, pairs, strict=True)]
        batch = tokenizer(lines, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        batch.input_ids[:, 0] = start_token  # BLIP's decoder starts with its own token
        targets = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        for row, (start, prefix) in enumerate(zip(starts, given, strict=True)):
            if prefix:  # what is given is not to be learnt
                targets[row, : lengths[start]] = -100
        out = model(
            pixel_values=normalize(pixels), input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=targets
        )
        return out.loss, {}

    def is_hidden(name: str, p: nn.Parameter) -> bool:
        return p.ndim == 2 and ".layer" in name

    vision, decoder = list(model.vision_model.named_parameters()), list(model.text_decoder.named_parameters())
    # The vision tower knows much already: it moves at half the pace.
    optimizer = Combined(
        torch.optim.Muon(
            [
                {"params": [p for n, p in vision if is_hidden(n, p)], "lr": args.lr / 2},
                {"params": [p for n, p in decoder if is_hidden(n, p)]},
            ],
            args.lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [
                {"params": [p for n, p in vision if not is_hidden(n, p)], "lr": args.lr / 2},
                {"params": [p for n, p in decoder if not is_hidden(n, p)]},
            ],
            args.lr, weight_decay=0.0,
        ),
    )  # fmt: skip
    Stage("captioner", {"captioner": model}, loss, optimizer, ema_decay=0.997).run(args)


if __name__ == "__main__":
    main()
