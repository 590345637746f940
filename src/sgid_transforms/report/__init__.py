"""Pictures and figures for people: what the augmentation does to their images."""

from sgid_transforms.report.contact_sheet import contact_sheet

__all__ = ["contact_sheet"]
