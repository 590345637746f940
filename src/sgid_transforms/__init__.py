"""Label- and caption-guided diffusion augmentation as a torchvision-style transform (SGID, AAAI 2024)."""

__version__ = "0.1.0"
