"""mmjax turns open unimodal models into multimodal language models, in JAX."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmjax.model import Model

__all__ = ["load"]

# transformers advises to install torch, which mmjax does without.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def load(path: str | Path, dtype: str = "float32", **options: Any) -> Model:
    """The model in a directory (Hugging Face, original layout, PEFT adapter, mmjax workdir); see mmjax.loading.load."""
    from mmjax import loading

    return loading.load(path, dtype, **options)
