"""The one reader of labels: every kind of number, and every way to name classes."""

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch

from sgid_transforms.images.labels import find_labels, label_field, label_name

CLASSES = ["cat", "dog"]
SYNONYMS = [("tabby cat", "tabby"), ("dog", "domestic dog")]


@pytest.mark.parametrize(
    "label", [1, np.int64(1), np.uint8(1), np.array(1), np.array([1]), torch.tensor(1), torch.tensor([1])], ids=repr
)
def test_every_kind_of_class_number_has_a_name(label: Any) -> None:
    assert label_name(label, CLASSES) == "dog"
    assert label_name(label, None, CLASSES) == "dog"
    assert label_name(label, {1: "hound"}, CLASSES) == "hound"
    assert label_name(label, {"1": "hound"}) == "hound"


@pytest.mark.parametrize("label", [-1, np.int64(-1), torch.tensor(-1), 2, None, 0.5, True, np.array([0, 1])], ids=repr)
def test_what_is_no_class_number_has_none(label: Any) -> None:
    """-1 means "no label" to many data sets; it once got the name of the last class."""
    assert label_name(label, CLASSES) is None
    assert label_name(label, None, CLASSES) is None


def test_of_synonyms_the_first_counts() -> None:
    assert label_name(0, None, SYNONYMS) == "tabby cat"
    assert label_name(1, SYNONYMS) == "dog"


def test_coded_names_are_mapped() -> None:
    words = {"n02123045": "tabby cat"}
    assert label_name("n02123045", words) == "tabby cat"
    assert label_name(0, words, ["n02123045"]) == "tabby cat"
    assert label_name("German_Shepherd", words) == "German Shepherd"


def test_numpy_labels_are_found_in_samples() -> None:
    image = object()
    assert find_labels((image, np.int64(3)), 1) == [3]
    assert find_labels({"image": image, "label": np.int32(3)}, 1) == [3]
    assert find_labels((image, np.array([3, 4])), 2) == [3, 4]


def test_the_field_of_a_label_is_told() -> None:
    assert label_field(OrderedDict(quality=1, label=0)) == "label"
    assert label_field({"quality": 1}) is None
