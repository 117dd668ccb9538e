"""A paged target made larger that answers as before, for the cost of a target of that size."""

import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper


def widen(source: Path, into: Path, times: int, seed: int = 0) -> None:
    """Write `source` with feed-forward layers `times` as wide to the new folder `into`.

    What is added has output projections of zero, so that it costs its time and adds nothing.
    """
    rng = np.random.default_rng(seed)
    shutil.copytree(source, into, ignore=shutil.ignore_patterns("model.onnx*"))
    model = onnx.load(source / "model.onnx")
    for tensor in model.graph.initializer:
        weights = numpy_helper.to_array(tensor)
        if ".mlp." not in tensor.name or weights.ndim != 2:
            continue
        if "down_proj" in tensor.name:
            added = np.zeros((weights.shape[0] * (times - 1), weights.shape[1]), weights.dtype)
            wide = np.concatenate([weights, added])
        else:
            noise = rng.standard_normal(weights.shape, np.float32) * weights.std()
            wide = np.concatenate([weights, np.tile(noise.astype(weights.dtype), times - 1)], axis=1)
        tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    del model.graph.value_info[:]
    onnx.save(model, into / "model.onnx", save_as_external_data=True, location="model.onnx.data")
