"""Where variants live: content-addressed image files with their provenance inside."""

from sgid_transforms.variants.codec import IMAGE_FORMATS
from sgid_transforms.variants.provenance import Provenance
from sgid_transforms.variants.store import StoreStats, Variant, VariantRef, VariantStore, VerifyReport
from sgid_transforms.variants.verdicts import Verdict

__all__ = ["IMAGE_FORMATS", "Provenance", "StoreStats", "Variant", "VariantRef", "VariantStore", "Verdict", "VerifyReport"]
