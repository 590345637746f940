"""The caption store: caption, label and similarity of each image, by image key."""

from sgid_transforms.captions.record import CaptionRecord
from sgid_transforms.captions.store import CaptionsReport, CaptionStore

__all__ = ["CaptionRecord", "CaptionStore", "CaptionsReport"]
