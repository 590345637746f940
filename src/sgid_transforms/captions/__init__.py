"""What is in an image: captions, labels and similarities by image key."""

from sgid_transforms.captions.record import CaptionRecord
from sgid_transforms.captions.store import CaptionsReport, CaptionStore

__all__ = ["CaptionRecord", "CaptionStore", "CaptionsReport"]
