"""What config.pbtxt of the embedder can say about batching, and a repository of variants that differ in it."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from scripts.optimization.batching import THREADS, Settings
from scripts.serving.installation import MODEL_REPOSITORY

EMBEDDER = MODEL_REPOSITORY / "embedder"


def shipped_config() -> ModelConfig:
    """Return the embedder's config.pbtxt."""
    return text_format.Parse((EMBEDDER / "config.pbtxt").read_text(encoding="utf-8"), ModelConfig())


def shipped() -> Settings:
    """Return what the embedder's config.pbtxt says."""
    config = shipped_config()
    batching = config.HasField("dynamic_batching")
    return Settings(
        config.max_batch_size,
        config.dynamic_batching.max_queue_delay_microseconds if batching else None,
        config.instance_group[0].count,
        int(config.parameters[THREADS].string_value),
    )


def write_repository(folder: Path, variants: Mapping[str, Settings]) -> None:
    """Fill `folder` with the embedder once under each name of `variants`.

    Raises FileNotFoundError when it is not built.
    """
    weights = (EMBEDDER / "1" / "model.onnx").resolve(strict=True)
    for name, settings in variants.items():
        config = shipped_config()
        config.name = name
        settings.apply(config)
        version = folder / name / "1"
        version.mkdir(parents=True)
        shutil.copy(weights, version)
        (folder / name / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")
