"""A model repository on disk."""

from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from scripts.serving.errors import ServeError


def model_names(repository: Path) -> list[str]:
    """Return the names of the models in `repository`.

    Raises ServeError when there are none, or when one still has to be built: a model other than an ensemble needs a
    version folder with something in it.
    """
    folders = sorted(config.parent for config in repository.glob("*/config.pbtxt"))
    if not folders:
        raise ServeError(f"{repository} holds no model: a model is a folder with a config.pbtxt")
    unbuilt = [folder.name for folder in folders if not _is_built(folder)]
    if unbuilt:
        raise ServeError(f"not built yet in {repository}: {', '.join(unbuilt)}; run `make models`")
    return [folder.name for folder in folders]


def _is_built(folder: Path) -> bool:
    versions = [version for version in folder.iterdir() if version.name.isdigit() and version.is_dir()]
    if not versions:
        return False
    config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    return config.platform == "ensemble" or any(any(version.glob("[!.]*")) for version in versions)
