"""transformers without its reports. Needs nothing that only training needs."""

import contextlib
import os
from collections.abc import Iterator

import transformers


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the library's report of what it loads, as a new task head is meant, and without its bars."""
    verbosity = transformers.logging.get_verbosity()
    has_bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if has_bars and not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
            transformers.logging.enable_progress_bar()  # type: ignore[no-untyped-call]
