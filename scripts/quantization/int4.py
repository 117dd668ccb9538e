"""Weights in 4 bits, activations as they were: com.microsoft.MatMulNBits."""

import logging
from collections.abc import Collection

import onnx
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from scripts.quantization.errors import QuantizationError
from scripts.quantization.row_int8 import quantize_tables

logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)

BLOCK_SIZES = (16, 32, 64, 128, 256)
ACCURACY_LEVEL = 4  # int8 arithmetic: on CPUs the fastest, and a row does not depend on its neighbours


def int4(
    model: onnx.ModelProto, block_size: int = 32, symmetric: bool = True, exclude: Collection[str] = ()
) -> onnx.ModelProto:
    """Return `model` with the constant matrices of its MatMuls in 4 bits, a scale per `block_size` weights of a column.

    symmetric: no zero points. Embedding tables become INT8 by row. Nodes named in `exclude` stay fp32.
    """
    quantizer = MatMulNBitsQuantizer(
        quantize_tables(model, exclude),
        block_size=block_size,
        is_symmetric=symmetric,
        accuracy_level=ACCURACY_LEVEL,
        nodes_to_exclude=list(exclude),
    )
    quantizer.process()
    made: onnx.ModelProto = quantizer.model.model
    if not any(node.op_type == "MatMulNBits" for node in made.graph.node):
        raise QuantizationError("found no MatMul with a constant matrix to store in 4 bits")
    return made
