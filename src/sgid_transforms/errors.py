"""Every error that this package raises on purpose, each also of the built-in kind that a caller would expect."""


class SGIDError(Exception):
    """Base of all errors raised by this package."""


class RecipeError(SGIDError, ValueError):
    """A recipe, or a setting that belongs into one, has a value that cannot work."""


class StoreError(SGIDError, OSError):
    """A store could not be opened, read or written."""


class GenerationError(SGIDError, RuntimeError):
    """An image could not be generated."""


class ModelLoadError(GenerationError):
    """A model could not be loaded: something is missing, or of a kind that is not supported."""


class ServiceError(SGIDError, RuntimeError):
    """The generation service is not running, died, or refused a request."""


class MissingCaptionError(SGIDError, KeyError):
    """The caption store knows nothing about an image."""

    def __str__(self) -> str:  # KeyError would print the repr of its argument
        return str(self.args[0]) if self.args else ""


class ImageError(SGIDError, ValueError):
    """An image file cannot be read; the message is the reason alone."""


class FolderError(SGIDError, OSError):
    """A folder of images is not there, or is not laid out as one folder for each class."""
