"""Joins label and caption into one prompt that fits the text encoder. Both are plain data and never interpreted."""

import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from sgid_transforms.errors import RecipeError
from sgid_transforms.recipe import checks as _checks

PLACEHOLDERS = ("label", "caption")
CAPTION_MODES = ("free", "label", "context")

_SEPARATORS = " \t\n,;:|-–—"
_CLOSING = ",;:.!?)]}"
_PREPOSITIONS = {
    "above", "across", "against", "along", "among", "around", "at", "before", "behind", "below", "beneath", "beside",
    "between", "by", "during", "from", "in", "inside", "into", "near", "next", "on", "onto", "outside", "over", "through",
    "toward", "towards", "under", "underneath", "upon", "with", "within", "without",
}  # fmt: skip
_BRACKETS = {"(": ")", "[": "]", "{": "}", '"': '"', "'": "'", "“": "”"}


def clean_label(name: str, class_names: Mapping[str, str] | None = None) -> str:
    """The class name as words: mapped by ``class_names`` if it is in there, else with underscores as spaces.

    Args:
        name: class name as the data set has it: ``tabby_cat``, ``Class_07``, ``n02123045``.
        class_names: words for coded names, such as ``{"n02123045": "tabby cat"}``; its values are used as they
            are. A name that is not in it is cleaned like any other.

    Raises:
        RecipeError: if nothing is left of the name.
    """
    words = _plain(class_names[name]) if class_names is not None and name in class_names else _plain(name.replace("_", " "))
    if not any(map(str.isalnum, words)):
        raise RecipeError(f"class name {name!r} has no words in it; map it with class_names={{{name!r}: ...}}")
    return words


def with_article(noun: str) -> str:
    """``a cat``, ``an airplane``: chosen by the first letter, which is right for nearly all class names."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}" if noun else ""


def names(text: str, name: str) -> bool:
    """Whether a text names a class: its words in order, in any case; the last one may be plural."""
    words = r"\W+".join(map(re.escape, re.findall(r"\w+", name)))
    return bool(words) and re.search(rf"(?<!\w){words}(?:s|es)?(?!\w)", text, re.IGNORECASE) is not None


def context_of(caption: str) -> str:
    """What a caption says about everything but its subject, so that it can describe another image as well.

    The subject is the noun phrase at the start: everything before the first comma or preposition. If a caption begins with a
    preposition, it begins with a piece of context, and the subject follows that piece.

    Examples:
        >>> context_of("a cat sitting on a red sofa")
        'on a red sofa'
        >>> context_of("a leopard frog, brown and green, on a white background")
        'brown and green, on a white background'
        >>> context_of("in a field, two horses under a cloudy sky")
        'in a field, under a cloudy sky'
        >>> context_of("a dog")
        ''
    """
    kept = []
    pieces = [piece.strip(_SEPARATORS) for piece in caption.rstrip(" .!").split(",")]
    while pieces and pieces[0].partition(" ")[0].lower() in _PREPOSITIONS:
        kept.append(pieces.pop(0))
    if pieces:
        words = pieces.pop(0).split(" ")
        place = next((index for index, word in enumerate(words) if word.lower() in _PREPOSITIONS), None)
        kept += [] if place is None else [" ".join(words[place:])]
    return ", ".join(piece for piece in [*kept, *pieces] if piece)


def without_name(text: str, name: str) -> str:
    """A context without those of its comma-separated pieces that name a class; if all of them do, without its subject."""
    pieces = [piece.strip(_SEPARATORS) for piece in text.rstrip(" .!").split(",")]
    kept = [piece for piece in pieces if piece and not names(piece, name)]
    if not kept:
        kept = [piece for piece in context_of(text).split(", ") if piece and not names(piece, name)]
    return ", ".join(kept)


def build_prompt(
    template: str, label: str, caption: str, *, tokenizer: Any | None = None, max_tokens: int | None = None
) -> str:
    """Put label and caption into the template, within the text encoder's token limit.

    A caption that is too long is cut at a word; the label and the template's own text never are. Without a caption, the
    punctuation that joined it to the rest is dropped: ``a photo of a {label}, {caption}`` becomes ``a photo of a frog``.
    Control characters and line breaks in label and caption become spaces; braces are kept.

    Args:
        template: text with ``{label}`` and ``{caption}``; ``{{`` and ``}}`` stand for braces.
        label: class name in words, see `clean_label`.
        caption: what is in the image; may be empty.
        tokenizer: the model's own tokenizer, called as ``tokenizer(text)["input_ids"]``, special tokens included.
        max_tokens: token limit of the prompt; ``None``: the tokenizer's ``model_max_length``.

    Raises:
        RecipeError: for a bad template, an empty label, or a label that does not fit even without a caption.
    """
    parts = parse_template(template)
    special = [token for token in getattr(tokenizer, "all_special_tokens", ()) if len(token) > 1]  # not SDXL's "!"
    label, words = _plain(label, special), _plain(caption, special).split(" ")
    if not label and any(placeholder == "label" for _, placeholder in parts):
        raise RecipeError("the label is empty; give the class name in words")
    whole = _render(parts, label, words)
    if tokenizer is None:
        if max_tokens is not None:
            raise RecipeError(
                f"max_tokens {max_tokens} was given without a tokenizer; pass the model's tokenizer to count with"
            )
        return whole
    limit = int(tokenizer.model_max_length) if max_tokens is None else max_tokens
    if _count(tokenizer, whole) <= limit:
        return whole

    # More words mean more tokens, so bisect for the most words that fit: `fits` words do, `over` words do not.
    bare = _render(parts, label, [])
    needed = _count(tokenizer, bare)
    if needed > limit:
        raise RecipeError(
            f"the prompt for label {_short(label)} has {needed} tokens without any caption, and the text encoder "
            f"takes {limit}; give a shorter name with class_names, or shorten the prompt template"
        )
    fits, over, best = 0, len(words), bare
    while over - fits > 1:
        middle = (fits + over) // 2
        prompt = _render(parts, label, words[:middle])
        if _count(tokenizer, prompt) <= limit:
            fits, best = middle, prompt
        else:
            over = middle
    return best


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """The template as (literal text, placeholder after it) pairs; only the last may have no placeholder.

    Raises:
        RecipeError: for unbalanced braces, or a placeholder that is not exactly ``{label}`` or ``{caption}``: attributes,
            indices, conversions and format specifications would reach into objects, so they are refused.
    """
    _checks.text("prompt", template)
    if not template.strip():
        raise RecipeError('the prompt template is empty; write one such as "a photo of a {label}, {caption}"')
    parts: list[tuple[str, str | None]] = []
    try:
        for literal, name, spec, conversion in string.Formatter().parse(template):
            if name is not None and (name not in PLACEHOLDERS or spec or conversion):
                shown = "{" + name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "") + "}"
                hint = _checks.did_you_mean(name, PLACEHOLDERS)
                raise RecipeError(
                    f"the prompt template has {shown}{hint}; "
                    "only {label} and {caption} are replaced, and {{ }} are braces"
                )
            parts.append((literal, name))
    except RecipeError:
        raise
    except ValueError as error:  # unbalanced braces
        raise RecipeError(
            f"the prompt template {_short(template)} has unbalanced braces ({error}); write {{{{ and }}}} for braces"
        ) from None
    return parts


def _render(parts: Sequence[tuple[str, str | None]], label: str, words: Sequence[str]) -> str:
    """The prompt with these caption words; an empty caption is dropped together with its separators."""
    caption = " ".join(words).rstrip(_SEPARATORS) if words else ""
    values = {"label": label, "caption": caption}
    if not caption:
        return _without_caption(parts, label)
    return "".join(literal + (values[name] if name else "") for literal, name in parts)


def _without_caption(parts: Sequence[tuple[str, str | None]], label: str) -> str:
    """The prompt without its captions, their separators, and brackets that held nothing else.

    Only the template's own text is trimmed: a label may end in a bracket or a comma and keeps it.
    """
    groups = [[""]]  # the template's texts: a label stands between two groups, a caption between two texts of one group
    for literal, name in parts:
        groups[-1][-1] += literal
        if name == "label":
            groups.append([""])
        elif name == "caption":
            groups[-1].append("")
    last = len(groups) - 1
    return label.join(_close_gaps(texts, first=index == 0, last=index == last) for index, texts in enumerate(groups))


def _close_gaps(texts: Sequence[str], *, first: bool, last: bool) -> str:
    """Join the texts around dropped captions; ``first``/``last``: the prompt starts/ends with them."""
    left = texts[0]
    for index, right in enumerate(texts[1:], start=2):
        left, right = left.rstrip(), right.lstrip()
        while left and right and _BRACKETS.get(left[-1]) == right[0]:
            left, right = left[:-1].rstrip(), right[1:].lstrip()
        if first and not left:
            left = right.lstrip(_SEPARATORS)
        elif last and index == len(texts) and not right:
            left = left.rstrip(_SEPARATORS)
        elif right and right[0] in _CLOSING:
            left = left.rstrip(_SEPARATORS) + right
        else:
            left = f"{left} {right}"
    return left


def _count(tokenizer: Any, text: str) -> int:
    # Real tokenizers log a warning about every text over their limit, but such texts are normal here.
    options = {"verbose": False} if hasattr(tokenizer, "deprecation_warnings") else {}
    return len(tokenizer(text, **options)["input_ids"])


def _plain(text: str, special: Sequence[str] = ()) -> str:
    """Text on one line: control characters, line breaks, lone surrogates, ``special`` and runs of spaces become one space."""
    if not text.isprintable():
        text = "".join(" " if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") else char for char in text)
    for token in special:  # "<|endoftext|>" in a caption would be read as the end of the prompt
        text = text.replace(token, " ")
    return " ".join(text.split())


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
