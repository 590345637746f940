"""The errors that this package raises. Each one also subclasses the built-in error that a caller would expect."""


class SGIDError(Exception):
    """Base of all errors raised by this package.

    Examples:
        >>> try:
        ...     Recipe(strength=2.0)
        ... except SGIDError as error:
        ...     print(type(error).__name__)
        RecipeError
    """


class RecipeError(SGIDError, ValueError):
    """A recipe, or a setting used with one, has a value that cannot work.

    Examples:
        >>> try:
        ...     Recipe(strength=2.0)
        ... except RecipeError as error:
        ...     print(error)
        strength 2.0 is outside 0.001 to 1
    """


class StoreError(SGIDError, OSError):
    """A store could not be opened, read or written.

    Examples:
        >>> try:
        ...     CaptionStore("nowhere.sqlite", readonly=True).get("0f" * 16)
        ... except StoreError as error:
        ...     print(error)
        there is no caption store at nowhere.sqlite; check the path, or open it without readonly=True
    """


class GenerationError(SGIDError, RuntimeError):
    """An image could not be generated.

    Examples:
        >>> issubclass(ModelLoadError, GenerationError)
        True
    """


class ModelLoadError(GenerationError):
    """A model could not be loaded: something is missing or not supported.

    Examples:
        >>> try:
        ...     Generator.from_recipe(Recipe(model="./no/such/folder"))
        ... except ModelLoadError as error:
        ...     print("not loaded")
        not loaded
    """


class DeviceLostError(GenerationError):
    """The device stopped working, so that nothing more can be made in this process. What was stored is kept.

    Examples:
        >>> issubclass(DeviceLostError, GenerationError)
        True
    """


class ServiceError(SGIDError, RuntimeError):
    """The generation service is not running, died, or refused a request.

    Examples:
        >>> try:
        ...     SGIDAugment().serve(device="cpu", max_batch=0)
        ... except ServiceError as error:
        ...     print(error)
        max_batch is 0; it must be at least 1
    """


class MissingCaptionError(SGIDError, KeyError):
    """The caption store has no caption or label for an image that needs one.

    Examples:
        >>> sgid = SGIDAugment(captions="empty.sqlite", p=1.0)
        >>> try:
        ...     sgid(ImageFolder("train")[0][0])
        ... except MissingCaptionError as error:
        ...     print("sgid.prepare(dataset)" in str(error))
        True
    """

    def __str__(self) -> str:  # KeyError would print the repr of its argument
        return str(self.args[0]) if self.args else ""


class ImageError(SGIDError, ValueError):
    """An image file cannot be read. The message gives only the reason, without the path."""


class FolderError(SGIDError, OSError):
    """A folder cannot be used: it does not exist, has no class folders, or overlaps with the images."""
