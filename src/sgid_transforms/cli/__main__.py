"""``python -m sgid_transforms.cli``: the command line where the console script is not on the path."""

from sgid_transforms.cli import main

main()
