"""Pictures and figures for people: what the augmentation does to their images."""

from sgid_transforms.report.contact_sheet import contact_sheet
from sgid_transforms.report.html import ReportError, write_report
from sgid_transforms.report.survey import ClassFacts, ImageFacts, Survey, VariantFacts, survey

__all__ = [
    "ClassFacts",
    "ImageFacts",
    "ReportError",
    "Survey",
    "VariantFacts",
    "contact_sheet",
    "survey",
    "write_report",
]
