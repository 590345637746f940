"""Similarity of images and texts by CLIP (Radford et al. 2021, arXiv 2103.00020)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sgid_transforms.errors import GenerationError, ModelLoadError
from sgid_transforms.models.checkpoints import check_weights, first_sentence, resolve_model
from sgid_transforms.models.loading import default_dtype, is_offline, quiet
from sgid_transforms.models.transfer import upload

LABEL_TEMPLATE = "a photo of a {label}"

_LONGEST = 16  # aspect ratio; longer images are cropped before they are resized
_TEXT_CACHE = 4096  # label prompts repeat and captions do not, so the cache is bounded


class CLIPScorer:
    """Scores images against texts, labels and other images with a CLIP model.

    The model is loaded from safetensors, on first use or by `load`. Nothing is downloaded for ``"tiny"``.

    Examples:
        >>> scorer = CLIPScorer("tiny")
        >>> image = torch.zeros(3, 32, 32, dtype=torch.uint8)
        >>> scorer.label_probabilities([image], ["cat", "dog"]).shape
        torch.Size([1, 2])

    Args:
        path: ``"tiny"`` (bundled), a local folder, or a hub id such as ``"openai/clip-vit-base-patch32"``.
        device: Where the model runs.
        dtype: Data type of the weights; None: float32 on a CPU, else bfloat16, or float16 where bfloat16 is not supported.
        batch_size: Images or texts in one forward pass.
        revision: Branch, tag or commit of a hub id.
        local_files_only: Never ask the hub; None: only when ``HF_HUB_OFFLINE`` is set.
    """

    def __init__(
        self,
        path: str = "tiny",
        device: str | torch.device = "cpu",
        *,
        dtype: torch.dtype | None = None,
        batch_size: int = 64,
        revision: str | None = None,
        local_files_only: bool | None = None,
    ) -> None:
        if batch_size < 1:
            raise GenerationError(f"batch_size {batch_size} leaves no room for an image; use at least 1")
        self.path = path
        self.revision = revision
        self.device = torch.device(device)
        self.batch_size = batch_size
        self._dtype = dtype
        self._offline = local_files_only
        self._model: Any = None
        self._tokenizer: Any = None
        self._processor: Any = None
        self._texts: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def id(self) -> str:
        """Name of the model, with its revision where one was given; the report shows it."""
        return self.path if self.revision is None else f"{self.path}@{self.revision}"

    def load(self) -> CLIPScorer:
        """Load the model now instead of on first use; returns the scorer.

        Raises:
            ModelLoadError: It cannot be loaded, or is not a CLIP.
        """
        if self._model is None:
            self._load()
        return self

    def image_features(self, images: Sequence[Tensor]) -> Tensor:
        """Unit-length features of images.

        Args:
            images: uint8 ``(3, H, W)`` each, of any sizes.

        Returns:
            float32 ``(N, D)`` on the CPU.
        """
        self.load()
        for image in images:
            if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
                raise GenerationError(
                    f"an image has shape {tuple(image.shape)} and dtype {image.dtype}; pass uint8 tensors of shape (3, H, W)"
                )
        features = []
        for start in range(0, len(images), self.batch_size):
            chunk = upload([self._middle(image) for image in images[start : start + self.batch_size]], self.device)
            inputs = self._processor(images=chunk, input_data_format="channels_first", return_tensors="pt")
            with torch.inference_mode():
                output = self._model.get_image_features(pixel_values=inputs["pixel_values"].to(self.device, self._model.dtype))
            features.append(_normalised(output))
        return torch.cat(features) if features else torch.zeros(0, self._width)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit-length features of texts, float32 ``(N, D)`` on the CPU; a text beyond the model's limit is cut."""
        self.load()
        missing = [text for text in dict.fromkeys(texts) if text not in self._texts]
        found = {text: self._texts[text] for text in texts if text in self._texts}
        for start in range(0, len(missing), self.batch_size):
            chunk = missing[start : start + self.batch_size]
            tokens = self._tokenizer(chunk, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt")
            with torch.inference_mode():
                output = self._model.get_text_features(
                    input_ids=tokens["input_ids"].to(self.device), attention_mask=tokens["attention_mask"].to(self.device)
                )
            found.update(zip(chunk, _normalised(output).unbind(), strict=True))
        for text in missing:
            self._texts[text] = found[text]
        while len(self._texts) > _TEXT_CACHE:
            self._texts.popitem(last=False)
        return torch.stack([found[text] for text in texts]) if texts else torch.zeros(0, self._width)

    def image_text(self, images: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        """Cosine of each image with the text at the same position, float32 ``(N,)`` in [-1, 1].

        Raises:
            GenerationError: Images and texts differ in number.
        """
        if len(images) != len(texts):
            raise GenerationError(f"{len(images)} images but {len(texts)} texts; pass one text for each image")
        return (self.image_features(images) * self.text_features(texts)).sum(1).clamp(-1, 1)

    def image_image(self, images: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        """Cosine of each image with the other one at the same position, float32 ``(N,)`` in [-1, 1].

        Raises:
            GenerationError: The two lists differ in length.
        """
        if len(images) != len(others):
            raise GenerationError(f"{len(images)} images but {len(others)} others; pass them in pairs")
        return (self.image_features(images) * self.image_features(others)).sum(1).clamp(-1, 1)

    def label_probabilities(self, images: Sequence[Tensor], labels: Sequence[str]) -> Tensor:
        """Probability of each label for each image: the softmax of CLIP's logits over the labels.

        Args:
            images: uint8 ``(3, H, W)`` each.
            labels: Class names, put into `LABEL_TEMPLATE`.

        Returns:
            float32 ``(N, L)``; rows sum to 1.
        """
        return self.probabilities(self.image_features(images), labels)

    def probabilities(self, image_features: Tensor, labels: Sequence[str]) -> Tensor:
        """Like `label_probabilities`, for image features ``(N, D)`` that are already computed.

        Raises:
            GenerationError: There are no labels, or one is repeated.
        """
        if not labels:
            raise GenerationError("there are no labels to choose from; pass the class names of the data set")
        if len(set(labels)) != len(labels):
            raise GenerationError("a label comes twice; pass each class name once")
        texts = self.text_features([LABEL_TEMPLATE.format(label=label) for label in labels])
        return (self._scale * image_features @ texts.T).softmax(1)

    def __getstate__(self) -> dict[str, Any]:
        # Keeps pickles small: another process loads the model itself.
        return self.__dict__ | {"_model": None, "_tokenizer": None, "_processor": None, "_texts": OrderedDict()}

    def _middle(self, image: Tensor) -> Tensor:
        """The middle of a very long image. The processor crops to it as well, but resizes first, which takes gigabytes."""
        longest = _LONGEST * min(image.shape[1:])
        if max(image.shape[1:]) <= longest or not getattr(self._processor, "do_center_crop", False):
            return image
        margins = [max(side - longest, 0) // 2 for side in image.shape[1:]]
        return image[:, margins[0] : image.shape[1] - margins[0], margins[1] : image.shape[2] - margins[1]]

    @property
    def _width(self) -> int:
        return int(self._model.config.projection_dim)

    def _load(self) -> None:
        source = resolve_model(self.path, "clip")
        offline = is_offline() if self._offline is None else self._offline
        if Path(source).is_dir():
            if not (Path(source) / "config.json").is_file():
                raise ModelLoadError(
                    f"{source} has no config.json, so it is not a CLIP model; give a folder made by save_pretrained"
                )
            check_weights(Path(source), source)
        common: dict[str, Any] = {"revision": self.revision, "local_files_only": offline}
        with quiet():
            from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel

            try:
                kind = AutoConfig.from_pretrained(source, **common).model_type
                if kind != "clip":
                    raise ModelLoadError(
                        f"{source} is a {kind} model, not a CLIP; choose one such as openai/clip-vit-base-patch32"
                    )
                dtype = self._dtype or default_dtype(self.device)
                self._model = CLIPModel.from_pretrained(source, use_safetensors=True, dtype=dtype, **common)
                self._tokenizer = AutoTokenizer.from_pretrained(source, **common)
                self._processor = AutoImageProcessor.from_pretrained(source, **common)
            except ModelLoadError:
                raise
            except Exception as error:
                self._model = None
                raise ModelLoadError(f"the CLIP model {self.path!r} cannot be loaded: {first_sentence(error)}") from error
        self._scale = float(self._model.logit_scale.detach().float().exp())
        self._model = self._model.to(self.device).eval()
        positions = int(self._model.config.text_config.max_position_embeddings)
        self._max_tokens = min(int(self._tokenizer.model_max_length), positions)


def _normalised(output: Any) -> Tensor:
    """Features as unit vectors; newer versions of transformers wrap them in an output object."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(features.float(), dim=-1).cpu()
