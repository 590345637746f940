"""Prompts within the text encoder's budget, and nothing in a label or caption interpreted."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgid_transforms.errors import RecipeError
from sgid_transforms.recipe.prompts import build_prompt, clean_label, parse_template

TEMPLATE = "a photo of a {label}, {caption}"


class FakeTokenizer:
    """Counts like CLIP's: a begin and an end token, a token for each mark and each three letters of a word."""

    all_special_tokens = ("<|startoftext|>", "<|endoftext|>", "!")
    model_max_length = 77

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, text: str) -> dict[str, list[int]]:
        self.seen.append(text)
        pieces = re.findall(r"\w{1,3}|[^\w\s]", text)
        return {"input_ids": [0, *range(1, len(pieces) + 1), 0]}


def _count(text: str) -> int:
    return len(FakeTokenizer()(text)["input_ids"])


class TestFits:
    def test_label_and_caption_take_their_places(self) -> None:
        assert build_prompt(TEMPLATE, "leopard frog", "a frog on a leaf") == "a photo of a leopard frog, a frog on a leaf"

    def test_caption_is_cut_at_a_word(self) -> None:
        caption = "brown and green, on a white background"
        cut = build_prompt(TEMPLATE, "frog", caption, tokenizer=FakeTokenizer(), max_tokens=16)
        assert cut == "a photo of a frog, brown and green"  # not "green,", and not a part of "on a white background"
        assert _count(cut) == 15

    def test_text_after_the_caption_is_kept(self) -> None:
        template = "a photo of a {label}, {caption}, high quality"
        cut = build_prompt(template, "frog", "a brown frog on a leaf", tokenizer=FakeTokenizer(), max_tokens=20)
        assert cut == "a photo of a frog, a brown, high quality"
        cut = build_prompt(template, "frog", "a brown frog on a leaf", tokenizer=FakeTokenizer(), max_tokens=16)
        assert cut == "a photo of a frog, high quality"

    def test_takes_the_tokenizers_own_limit(self) -> None:
        tokenizer = FakeTokenizer()
        prompt = build_prompt(TEMPLATE, "frog", "word " * 200, tokenizer=tokenizer)
        assert 75 <= _count(prompt) <= 77
        assert len(tokenizer.seen) < 15  # halving, not word by word

    def test_a_tokenizer_without_a_limit_cuts_nothing(self) -> None:
        tokenizer = FakeTokenizer()
        tokenizer.model_max_length = int(1e30)  # transformers' way of saying that there is none
        assert build_prompt(TEMPLATE, "frog", "word " * 200, tokenizer=tokenizer).count("word") == 200

    def test_label_that_does_not_fit_alone_is_an_error(self) -> None:
        with pytest.raises(RecipeError) as caught:
            build_prompt(TEMPLATE, "very " * 40 + "long name", "x", tokenizer=FakeTokenizer())
        message = str(caught.value)
        assert re.search(
            r"for label 'very very .*\.\.\.' has \d+ tokens without any caption, and the text encoder takes 77", message
        )
        assert "class_names" in message
        assert "\n" not in message

    def test_limit_needs_a_tokenizer(self) -> None:
        with pytest.raises(RecipeError, match="max_tokens 77 was given without a tokenizer"):
            build_prompt(TEMPLATE, "frog", "x", max_tokens=77)

    @given(
        st.sampled_from(
            [TEMPLATE, "{caption}. {label}!", "{label}", "x {caption} y {label} z", "{label} ({caption}), {caption}"]
        ),
        st.lists(st.text("abcXYZ{}[]%s-,", min_size=1, max_size=9), min_size=1, max_size=3),
        st.lists(st.text("abcdefgh{}%\n\t,;", max_size=12), max_size=40),
        st.integers(5, 60),
    )
    def test_budget_holds_and_the_label_survives(self, template: str, label: list[str], caption: list[str], limit: int) -> None:
        name, text = " ".join(label), " ".join(caption)
        if _count(build_prompt(template, name, "")) > limit:
            with pytest.raises(RecipeError, match="without any caption"):
                build_prompt(template, name, text + " word" * limit, tokenizer=FakeTokenizer(), max_tokens=limit)
            return
        prompt = build_prompt(template, name, text, tokenizer=FakeTokenizer(), max_tokens=limit)
        assert _count(prompt) <= limit
        assert name in prompt
        assert build_prompt(template, name, text, tokenizer=FakeTokenizer(), max_tokens=10**9) == build_prompt(
            template, name, text
        )
        if "{caption}" in template and text.split():
            longer = build_prompt(template, name, text)
            assert prompt == longer or _count(longer) > limit

    @given(st.lists(st.text("abcdefg", min_size=1, max_size=9), min_size=1, max_size=30), st.integers(9, 80))
    def test_no_word_is_given_away(self, words: list[str], limit: int) -> None:
        prompt = build_prompt(TEMPLATE, "frog", " ".join(words), tokenizer=FakeTokenizer(), max_tokens=limit)
        kept = prompt.removeprefix("a photo of a frog").removeprefix(", ").split()
        assert kept == words[: len(kept)]
        if len(kept) < len(words):
            assert _count(build_prompt(TEMPLATE, "frog", " ".join(words[: len(kept) + 1]))) > limit


class TestWithoutCaption:
    @pytest.mark.parametrize(
        ("template", "expected"),
        [
            (TEMPLATE, "a photo of a frog"),
            ("{caption}, a photo of a {label}", "a photo of a frog"),
            ("a {label} ({caption}), sharp", "a frog, sharp"),
            ("a {label} ( {caption} )", "a frog"),
            ('a {label}: "{caption}".', "a frog."),
            ("a {label}, {caption}, high quality", "a frog, high quality"),
            ("a {label} - {caption}.", "a frog."),
            ("a {label} {caption} outside", "a frog outside"),
            ("{label}{caption}", "frog"),
            ("{caption}{label}", "frog"),
            ("{caption} {caption}, {label}", "frog"),
            ("{label}, {caption}, {caption}", "frog"),
            ("{caption}", ""),
            ("{label}", "frog"),
            ("{{{label}, {caption}}}", "{frog}"),
        ],
    )
    @pytest.mark.parametrize("caption", ["", " \n\t", " , "])
    def test_nothing_dangles(self, template: str, expected: str, caption: str) -> None:
        assert build_prompt(template, "frog", caption) == expected

    def test_the_labels_own_marks_stay(self) -> None:
        assert build_prompt("{label}, {caption}", "no. 5 -", "") == "no. 5 -"
        assert build_prompt("{caption}, {label}", ", etc.", "") == ", etc."
        assert build_prompt("({caption}) {label}", "(red)", "") == "(red)"


class TestHostile:
    @pytest.mark.parametrize(
        "template",
        [
            "{label.__class__}",
            "{label.__class__.__mro__}",
            "{label[0]}",
            "{label!r}",
            "{label:>9999999999}",
            "{label:{caption}}",
            "{0}",
            "{}",
            "{ label }",
            "{class}",
            "{label} {prompt}",
        ],
    )
    def test_templates_reach_into_nothing(self, template: str) -> None:
        with pytest.raises(RecipeError, match=r"only {label} and {caption} are replaced"):
            build_prompt(template, "frog", "x")

    @pytest.mark.parametrize("template", ["{label", "label}", "{", "}", "{{{label}}"])
    def test_unbalanced_braces(self, template: str) -> None:
        with pytest.raises(RecipeError, match="has unbalanced braces"):
            parse_template(template)

    @pytest.mark.parametrize("template", ["", "  \n"])
    def test_empty_template(self, template: str) -> None:
        with pytest.raises(RecipeError, match="the prompt template is empty"):
            parse_template(template)

    def test_nearest_placeholder_is_named(self) -> None:
        with pytest.raises(RecipeError, match=r"has {captoin} \(did you mean 'caption'\?\)"):
            parse_template("{captoin}")

    @pytest.mark.parametrize("text", ["{label}", "{caption}", "{label.__class__}", "{{}}", "%s %(x)s", "$label", "\\n", "{0}"])
    def test_braces_in_label_and_caption_stay_what_they_are(self, text: str) -> None:
        assert build_prompt(TEMPLATE, text, text) == f"a photo of a {text}, {text}"

    def test_control_characters_become_spaces(self) -> None:
        prompt = build_prompt(TEMPLATE, "tree\nfrog\x00", "on\r\na\u2028leaf\x1b[31m \ud800\x85 end")
        assert prompt == "a photo of a tree frog, on a leaf [31m end"
        prompt.encode("utf-8")

    def test_other_scripts_and_joiners_are_left_alone(self) -> None:
        label = "می‌خواهم 青蛙 🐸"
        assert build_prompt("{label}", label, "") == label

    def test_special_tokens_cannot_end_the_prompt_early(self) -> None:
        prompt = build_prompt(TEMPLATE, "frog", "a<|endoftext|>leaf!", tokenizer=FakeTokenizer())
        assert prompt == "a photo of a frog, a leaf!"  # SDXL pads with "!", which is an ordinary mark as well

    @given(st.text(), st.text())
    def test_any_text_is_harmless(self, label: str, caption: str) -> None:
        prompt = build_prompt(TEMPLATE, f"frog {label}", caption, tokenizer=FakeTokenizer(), max_tokens=10**6)
        assert prompt.startswith("a photo of a frog")
        assert prompt == " ".join(prompt.split())
        prompt.encode("utf-8")

    @pytest.mark.parametrize("label", ["", " ", "\n", "\ud800"])
    def test_empty_label(self, label: str) -> None:
        with pytest.raises(RecipeError, match="the label is empty"):
            build_prompt(TEMPLATE, label, "a leaf")
        assert build_prompt("{caption}", label, "a leaf") == "a leaf"


class TestCleanLabel:
    @pytest.mark.parametrize(
        ("name", "class_names", "expected"),
        [
            ("tabby_cat", None, "tabby cat"),
            ("__tabby__cat_", {}, "tabby cat"),
            ("Class_07", {"Class_07": "Golden_Retriever dog"}, "Golden_Retriever dog"),
            ("n02123045", {"n02123045": " tabby\ncat "}, "tabby cat"),
            ("n02123046", {"n02123045": "tabby cat"}, "n02123046"),
            ("tabby_cat", {"tabby cat": "never"}, "tabby cat"),
            ("Müller_{x}", None, "Müller {x}"),
        ],
    )
    def test_words(self, name: str, class_names: dict[str, str] | None, expected: str) -> None:
        assert clean_label(name, class_names) == expected

    @pytest.mark.parametrize(("name", "class_names"), [("", None), ("__", None), ("\x00", {}), ("x", {"x": " "})])
    def test_nothing_left(self, name: str, class_names: dict[str, str] | None) -> None:
        with pytest.raises(RecipeError, match="has no words in it; map it with class_names"):
            clean_label(name, class_names)


class TestRealTokenizer:
    """A `transformers` tokenizer, built here: a token a word, CLIP's begin and end tokens."""

    @pytest.fixture
    def tokenizer(self) -> Any:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "[UNK]": 2, "frog": 3, "a": 4, "photo": 5, "of": 6, ",": 7}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.post_processor = processors.TemplateProcessing(
            single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<|startoftext|>", eos_token="<|endoftext|>", model_max_length=16
        )

    def test_counts_and_stays_silent(self, tokenizer: Any, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
        """A text over the limit used to be logged as an indexing error to come, on every run."""
        prompt = build_prompt(TEMPLATE, "frog", "leaf " * 30 + "<|endoftext|>", tokenizer=tokenizer)
        assert prompt == "a photo of a frog, " + " ".join(["leaf"] * 8)
        assert len(tokenizer(prompt)["input_ids"]) == 16
        assert "Token indices" not in caplog.text + "".join(capfd.readouterr())
