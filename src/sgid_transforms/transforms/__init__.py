"""When a variant replaces the image: the transform, its data set, its gate and its shared state."""
