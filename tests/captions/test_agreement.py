"""Which captions contradict their labels, and whose contexts travel."""

from dataclasses import replace

import pytest

from sgid_transforms.captions.agreement import LENDERS, ClassWords, checked, lenders
from sgid_transforms.captions.record import CaptionRecord

WORDS = ClassWords(["cat", "dog", "lion", "sea lion", "box"], {"tabby_cat": "cat", "n02085620": "dog", 3: "lion", "": "cat"})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a cat and two Dogs", {"cat", "dog"}),
        ("a sea  lion on a rock", {"sea lion"}),
        ("a tabby cat", {"cat"}),
        ("three boxes", {"box"}),
        ("a category of hotdogs at 3", set()),
        ("", set()),
    ],
)
def test_classes_are_named_by_whole_words(text: str, named: set[str]) -> None:
    assert WORDS.named(text) == named


@pytest.mark.parametrize(
    ("label", "caption", "contradicts"),
    [
        ("cat", "a dog on a sofa", True),
        ("cat", "a dog beside a cat", False),
        ("cat", "a furry animal", False),
        ("sea lion", "a lion", True),
        (None, "a dog", False),
    ],
)
def test_a_caption_contradicts_by_naming_another_class_and_not_its_own(
    label: str | None, caption: str, contradicts: bool
) -> None:
    assert WORDS.contradict(CaptionRecord("ab" * 16, caption, label)) == contradicts


def test_only_records_that_change_are_given_and_the_scorer_keeps_its_say() -> None:
    fine = CaptionRecord("aa" * 16, "a cat", "cat")
    wrong = CaptionRecord("bb" * 16, "a dog", "cat")
    doubted = replace(wrong, key="cc" * 16, contradiction="scorer")
    renamed = CaptionRecord("dd" * 16, "a dog", "dog", contradiction="words, scorer")
    given = [fine, wrong, doubted, renamed, replace(wrong, contradiction="words")]
    assert [(record.key[0], record.contradiction) for record in checked(given, WORDS)] == [
        ("b", "words"),
        ("c", "words, scorer"),
        ("d", "scorer"),
    ]


def test_all_lend_in_a_small_data_set_and_an_even_share_in_a_large_one() -> None:
    def context(record: CaptionRecord) -> str:
        return f"of {record.key}"

    small = [CaptionRecord(f"{n:08x}", "", "cat") for n in range(50)]
    assert lenders(small, context) == {record.key: f"of {record.key}" for record in small}
    large = [CaptionRecord(f"{n:08x}", "", f"class {n % 4}") for n in range(4 * LENDERS)]
    lent = lenders(large, context)
    assert [sum(int(key, 16) % 4 == label for key in lent) for label in range(4)] == [LENDERS // 4] * 4
    assert lenders(reversed(large), context) == lent, "it does not depend on the order"
