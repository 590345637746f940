"""Stage 0: a byte-pair vocabulary in CLIP's format, learnt from the training captions.

CLIP, the captioner's targets and the pipeline share it: almost every word of a CIFAR-10 caption is one token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from common import parser
from data import CLASSES, load_split
from words import article, caption, describe

MAX_LENGTH = 32
START, END = "<|startoftext|>", "<|endoftext|>"


def texts(data: str) -> list[str]:
    """The training captions of ``pretrain``, and the prompts that stand around a label."""
    split = load_split(data, "pretrain")
    looks = describe(split.images)
    lines = [caption(sub, look) for sub, look in zip(split.subnames, looks, strict=True)]
    return lines + [f"a photo of {article(name)}, {line}" for name in CLASSES for line in lines[:200]]


def train(data: str, out: Path) -> None:
    """Write ``vocab.json`` and ``merges.txt``; ``load`` reads them."""
    bpe = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, min_frequency=4, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(texts(data), trainer)
    model = json.loads(bpe.to_str())["model"]
    # CLIP's vocabulary holds every byte both inside a word and at its end, so that any text has a spelling.
    byte = sorted(alphabet)
    words = byte + [b + "</w>" for b in byte]
    merges = [tuple(m) for m in model["merges"]]
    words += [w for w in ("".join(m) for m in merges) if w not in set(words)]
    words = [*dict.fromkeys(words), START, END]
    out.mkdir(parents=True, exist_ok=True)
    (out / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}, ensure_ascii=False))
    (out / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")


def extend(folder: Path, words: Iterable[str]) -> int:
    """Make one token of each word that takes several; ids that exist stay. Returns how many tokens were added."""
    vocab: dict[str, int] = json.loads((folder / "vocab.json").read_text())
    merges = (folder / "merges.txt").read_text().splitlines()
    before = len(vocab)
    for word in words:
        tokens = load(folder).tokenize(word)
        while len(tokens) > 1:
            merges.append(f"{tokens[0]} {tokens[1]}")
            tokens[:2] = [tokens[0] + tokens[1]]
            vocab.setdefault(tokens[0], len(vocab))
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
        (folder / "merges.txt").write_text("\n".join(merges) + "\n")
    return len(vocab) - before


def load(folder: Path):
    """The ``CLIPTokenizer`` of the two files in ``folder``."""
    from transformers import CLIPTokenizer

    vocab = json.loads((folder / "vocab.json").read_text())
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    return CLIPTokenizer(
        vocab=vocab, merges=merges, unk_token=END, bos_token=START, eos_token=END, pad_token=END, model_max_length=MAX_LENGTH
    )


def main() -> None:
    p = parser(__doc__.splitlines()[0])
    args = p.parse_args()
    train(args.data, args.work / "tokenizer")
    tokenizer = load(args.work / "tokenizer")
    lines = texts(args.data)
    counts = [len(ids) for ids in tokenizer(lines[:5000] + lines[-2000:])["input_ids"]]
    print(f"{len(tokenizer)} tokens; captions: mean {sum(counts) / len(counts):.1f}, longest {max(counts)} of {MAX_LENGTH}")
    print(tokenizer.tokenize(lines[0]), tokenizer.tokenize("a Übersee-dampfer naïve 字"))


if __name__ == "__main__":
    main()
