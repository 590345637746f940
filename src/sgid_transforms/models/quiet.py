"""Third-party noise, kept out of the user's log while a model is loaded or run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars and nothing below an error from diffusers and transformers; their settings come back afterwards.

    Downloads keep their progress bars: those come from huggingface_hub, and a wait of minutes should be visible.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    with ExitStack() as stack:
        for logging in (diffusers_logging, transformers_logging):
            stack.callback(logging.set_verbosity, logging.get_verbosity())
            logging.set_verbosity_error()
            if logging.is_progress_bar_enabled():
                stack.callback(logging.enable_progress_bar)
                logging.disable_progress_bar()
        with quiet_deprecations():
            yield


@contextmanager
def quiet_calls() -> Iterator[None]:
    """Nothing below an error from diffusers while a pipeline runs: what it says then, it says at every call."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with quiet_deprecations():
            yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def quiet_deprecations() -> Iterator[None]:
    """Hide what diffusers' pipelines do to themselves: deprecated calls from one of its modules to another."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"[\s\S]*is deprecated and will be removed in version", category=FutureWarning
        )
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(diffusers|transformers|torch|numpy)(\.|$)")
        yield


def first_sentence(error: BaseException) -> str:
    """The first line of an exception's text, for messages that must stay one sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def is_offline() -> bool:
    """Whether huggingface_hub was told to stay offline (``HF_HUB_OFFLINE=1``)."""
    from huggingface_hub import constants

    offline: Any = constants.HF_HUB_OFFLINE
    return bool(offline)
