import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from sgid_transforms.errors import ModelLoadError
from sgid_transforms.models.classifier import ImageClassifier


def classifier(folder, names):
    """A real model that answers by the mean colour alone: each class has one colour, red, green or blue."""
    config = ViTConfig(
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=16,
        patch_size=16,
        hidden_act="relu",
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    model = ViTForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        convolution = model.vit.embeddings.patch_embeddings.projection
        for colour in range(3):
            convolution.weight[colour, colour] = 1 / 256
        model.vit.layernorm.weight.fill_(1)
        block = next(module for name, module in model.named_modules() if name.endswith(("layer.0", "layers.0")))
        for module in block.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.fill_(1)
            if isinstance(module, torch.nn.Linear) and module.in_features == module.out_features:
                module.weight.copy_(torch.eye(module.in_features))
        for number in range(len(names)):
            model.classifier.weight[number, number] = 1
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def plain(colour, height=16, width=16):
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[colour] = 255
    return image


def test_it_names_the_class_whatever_the_order_case_and_spelling_of_the_names(tmp_path):
    path = classifier(tmp_path, ["Fire_engine", "frog", "sea"])
    images = [plain(1), plain(0, 20, 40), plain(2), plain(0)]
    assert ImageClassifier(path, ["frog", "sea", "fire engine"], batch_size=3).answers(images) == [
        "frog", "fire engine", "sea", "fire engine",
    ]  # fmt: skip


def test_it_chooses_among_the_given_classes_only(tmp_path):
    path = classifier(tmp_path, ["fire engine", "frog", "sea"])
    assert ImageClassifier(path, ["frog", "sea"]).answers([plain(1), plain(2)]) == ["frog", "sea"]
    assert set(ImageClassifier(path, ["frog", "sea"]).answers([plain(0)] * 3)) <= {"frog", "sea"}


def test_an_unknown_class_is_refused(tmp_path):
    path = classifier(tmp_path, ["fire engine", "frog", "sea"])
    with pytest.raises(ModelLoadError, match="does not know the class 'cat' and 1 more; its id2label must have the class"):
        ImageClassifier(path, ["frog", "cat", "dog"])


def test_what_is_no_classifier_or_a_pickle_is_refused(tmp_path):
    with pytest.raises(ModelLoadError, match="does not exist"):
        ImageClassifier(str(tmp_path / "none"), ["cat"])
    path = classifier(tmp_path / "c", ["cat", "dog", "sea"])
    (tmp_path / "c" / "model.safetensors").rename(tmp_path / "c" / "pytorch_model.bin")
    with pytest.raises(ModelLoadError):
        ImageClassifier(path, ["cat"])
