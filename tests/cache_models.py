"""What a cache in a test's repository needs of the project's own models."""

import shutil
from pathlib import Path

from scripts.serving.server import MODEL_REPOSITORY


def add_cache_models(repository: Path, cache: str = "semantic_cache") -> None:
    """Copy the tokenizer into the model `cache`, and the pair model beside it."""
    (repository / cache / "1").mkdir(parents=True, exist_ok=True)
    shutil.copy2(MODEL_REPOSITORY / "semantic_cache" / "1" / "tokenizer.json", repository / cache / "1")
    shutil.copytree(MODEL_REPOSITORY / "pair_model", repository / "pair_model")
