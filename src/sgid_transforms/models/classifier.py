"""A user's own image classifier, in the format of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgid_transforms.errors import ModelLoadError
from sgid_transforms.models.checkpoints import check_weights, first_sentence, resolve_model


class ImageClassifier:
    """Tells which class an image shows.

    Args:
        path: A local folder made by ``save_pretrained``, or a hub id. Only safetensors are loaded, never remote code.
        labels: Class names that it must know, in any case and with spaces or underscores.
        device: Where the model runs.
        batch_size: Images per forward pass.

    Raises:
        ModelLoadError: The model cannot be loaded, or it lacks one of the class names.

    Examples:
        >>> classifier = ImageClassifier("my-classifier", ["cat", "dog"])
        >>> classifier.answers([torch.zeros(3, 32, 32, dtype=torch.uint8)])
        ['dog']
    """

    def __init__(self, path: str, labels: Sequence[str], *, device: str | torch.device = "cpu", batch_size: int = 64) -> None:
        from sgid_transforms.models.loading import is_offline, quiet

        source = resolve_model(path, "classifier")
        if Path(source).is_dir():
            check_weights(Path(source), source)
        common: dict[str, Any] = {"local_files_only": is_offline(), "trust_remote_code": False}
        try:
            with quiet():
                from transformers import AutoImageProcessor, AutoModelForImageClassification

                self._processor: Any = AutoImageProcessor.from_pretrained(source, **common)
                model: Any = AutoModelForImageClassification.from_pretrained(source, use_safetensors=True, **common)
        except (OSError, ValueError, ImportError) as error:
            raise ModelLoadError(f"the classifier {path!r} cannot be loaded: {first_sentence(error)}") from error
        known = {_plain(name): index for index, name in model.config.id2label.items()}
        missing = [label for label in labels if _plain(label) not in known]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ModelLoadError(
                f"the classifier {path!r} does not know the class {missing[0]!r}{more}; its id2label must have the class names "
                "of the data"
            )
        self.id = path
        self.batch_size = batch_size
        self._labels = list(labels)
        self._columns = [known[_plain(label)] for label in labels]
        self._model = model.eval().to(device)
        self._device = torch.device(device)

    @torch.inference_mode()
    def answers(self, images: Sequence[Tensor]) -> list[str]:
        """The likeliest of the class names for each uint8 image ``(3, H, W)``, of any sizes."""
        answers: list[str] = []
        for start in range(0, len(images), self.batch_size):
            chunk = list(images[start : start + self.batch_size])
            inputs = self._processor(images=chunk, input_data_format="channels_first", return_tensors="pt")
            logits = self._model(pixel_values=inputs["pixel_values"].to(self._device, self._model.dtype)).logits
            answers += [self._labels[index] for index in logits[:, self._columns].argmax(1).tolist()]
        return answers


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())
