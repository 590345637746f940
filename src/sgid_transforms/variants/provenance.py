"""How a variant was made, stored inside its file."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sgid_transforms.errors import StoreError


@dataclass(frozen=True)
class Provenance:
    """Everything that determined one variant.

    Args:
        prompt: The text that the model saw, after truncation.
        negative_prompt: The text that the model was steered away from.
        seed: Seed of the noise in the accepted attempt.
        strength: Share of the noise schedule that was run, in (0, 1].
        guidance_scale: Classifier-free guidance scale.
        similarity: Cosine of the image and its prompt; similarity guidance turns its rank in the data set into the guidance
            scale.
        label_score: Probability of the label according to the label filter.
        image_similarity: Cosine of the variant's and the original's image embeddings.
        model: Model id or folder.
        revision: Revision of the model.
        sampler: Name of the sampler.
        num_inference_steps: Length of the whole schedule.
        attempt: 0 for the first try, 1 for the first retry after a filter, ...
        label: Name of the class.
        caption: The caption behind the prompt.
        versions: Package name -> version.
        extra: Anything else that JSON can hold.

    Examples:
        >>> Provenance.from_json(Provenance("a photo of a cat", seed=1).to_json()).seed
        1
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    strength: float = 0.0
    guidance_scale: float = 0.0
    similarity: float | None = None
    label_score: float | None = None
    image_similarity: float | None = None
    model: str = ""
    revision: str | None = None
    sampler: str = ""
    num_inference_steps: int = 0
    attempt: int = 0
    label: str | None = None
    caption: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line of ASCII JSON, the same for equal provenances.

        Raises:
            StoreError: A number is not finite, or ``extra`` holds a value that JSON cannot represent.
        """
        values = {name: getattr(self, name) for name in _FIELDS}
        values |= {"versions": dict(self.versions), "extra": dict(self.extra)}
        for name in ("similarity", "label_score", "image_similarity"):  # a score that could not be computed is no score
            if isinstance(values[name], float) and not math.isfinite(values[name]):
                values[name] = None
        try:
            # ASCII escapes make NUL, surrogates and any other text harmless to the file.
            return json.dumps(values, ensure_ascii=True, allow_nan=False, sort_keys=True, separators=(",", ":"))
        except (TypeError, ValueError, RecursionError) as error:
            raise StoreError(f"the provenance of a variant cannot be written as JSON: {error}") from error

    @classmethod
    def from_json(cls, text: str | bytes) -> "Provenance":
        """Read what ``to_json`` wrote; fields of later versions are ignored.

        Raises:
            ValueError: Not JSON, not an object, or a field of the wrong type.
        """
        try:
            values = json.loads(text)
        except RecursionError as error:
            raise ValueError("the provenance is nested too deeply") from error
        if not isinstance(values, dict):
            raise ValueError("the provenance is not a JSON object")
        known = {name: value for name, value in values.items() if name in _FIELDS}
        for name, value in known.items():
            if not isinstance(value, _FIELDS[name]) or isinstance(value, bool):
                raise ValueError(f"the provenance's {name} is {type(value).__name__}")
        if "prompt" not in known:
            raise ValueError("the provenance has no prompt")
        return cls(**known)


# What isinstance takes for types that are not plain classes; other languages write 1.0 as 1 in JSON.
_IN_JSON: dict[Any, Any] = {
    float: int | float,
    float | None: int | float | None,
    Mapping[str, str]: dict,
    Mapping[str, Any]: dict,
}
_FIELDS: dict[str, Any] = {item.name: _IN_JSON.get(item.type, item.type) for item in dataclasses.fields(Provenance)}
