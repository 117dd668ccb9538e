"""What happens to an fp32 graph before it is quantized: ONNX Runtime's pre-processing, and names for all nodes."""

import contextlib
import logging
import tempfile
from pathlib import Path

import onnx
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.quantization.shape_inference import quant_pre_process

from scripts.quantization import graph
from scripts.quantization.model_file import save_model

logger = logging.getLogger(__name__)
logging.getLogger("onnxruntime.quantization.shape_inference").setLevel(logging.WARNING)


def prepare(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return `model` with constants folded, shapes inferred and each Gemm written as MatMul and Add."""
    # Symbolic inference leaves a file in the current folder when it gives up.
    with tempfile.TemporaryDirectory(prefix="quantize-") as scratch, contextlib.chdir(scratch):
        source, prepared = Path(scratch, "model.onnx"), Path(scratch, "prepared.onnx")
        save_model(model, source.parent)
        external = any(source.parent.glob("*.data"))
        try:
            quant_pre_process(source, prepared, save_as_external_data=external, all_tensors_to_one_file=True)
        except Exception as error:  # symbolic inference raises bare exceptions for operators that it does not know
            logger.info("symbolic shape inference gave up (%s); going on without it", error)
            quant_pre_process(
                source, prepared, skip_symbolic_shape=True, save_as_external_data=external, all_tensors_to_one_file=True
            )
        model = onnx.load(prepared)
    wrapped = ONNXModel(model)
    wrapped.replace_gemm_with_matmul()
    graph.drop_unread(wrapped.model.graph)  # the matrices of replaced Gemms
    graph.name_nodes(wrapped.model)
    return wrapped.model
