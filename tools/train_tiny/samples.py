"""Write the sample images that the package ships: the first of each class in ``test``, as an ImageFolder of PNG files."""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from data import CLASSES, load_split


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", required=True)
    p.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "src" / "sgid_transforms" / "assets" / "samples")
    p.add_argument("--per-class", type=int, default=20)
    args = p.parse_args()
    data = load_split(args.data, "test")
    for label, name in enumerate(CLASSES):
        folder = args.out / name
        folder.mkdir(parents=True, exist_ok=True)
        for index in (data.labels == label).nonzero().flatten()[: args.per_class].tolist():
            image = Image.fromarray(data.images[index].permute(1, 2, 0).numpy())
            image.save(folder / Path(data.names[index]).with_suffix(".png").name, optimize=True)


if __name__ == "__main__":
    main()
