"""Reading an fp32 model, checking that it can be quantized, and writing what became of it."""

import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, version_converter

from scripts.quantization.errors import QuantizationError

OLDEST_OPSET, UPGRADED_OPSET = 13, 18  # 13: scales per channel; 18: what row-wise INT8 needs
IR_VERSION = 10  # the newest that ONNX Runtime 1.18 to 1.32 all read; onnx's packages write newer ones
ONE_FILE_BYTES = 1 << 30  # weights above this go into a file beside the graph: protobuf ends at 2 GB
RECORD = "quantization"  # key in the ONNX metadata
# What a graph has once it is quantized.
QUANTIZED_OPERATORS = re.compile(
    "(Dynamic)?QuantizeLinear|DequantizeLinear|(MatMul|Conv)Integer.*|QLinear.*|DynamicQuantizeMatMul|MatMulNBits|"
    "GatherBlockQuantized|QAttention|QGemm"
)


def load_model(path: Path, upgrade_opset: bool = False) -> onnx.ModelProto:
    """Read the fp32 model at `path`, external data included; with `upgrade_opset` an old one is converted.

    Raises QuantizationError for a file that is not ONNX, is too old, or is quantized already.
    """
    try:
        model = onnx.load(path)
    except FileNotFoundError as error:
        raise QuantizationError(f"{error.filename or path} does not exist") from error
    except (DecodeError, onnx.checker.ValidationError, IsADirectoryError, ValueError) as error:
        raise QuantizationError(f"{path} is not an ONNX file that can be read: {error}") from error
    if not model.graph.node or not model.opset_import:
        raise QuantizationError(f"{path} is not an ONNX model: it has no graph")
    _require_unquantized(path, model)
    return _with_opset(path, model, upgrade_opset)


def save_model(model: onnx.ModelProto, folder: Path, one_file_bytes: int = ONE_FILE_BYTES) -> None:
    """Write `folder`/model.onnx, the weights beside it where they exceed `one_file_bytes`.

    The graph appears, or takes the place of an earlier one, in one step: each data file has a name of its own.
    """
    content = onnx.ModelProto()
    content.CopyFrom(model)
    content.ir_version = min(content.ir_version, IR_VERSION)
    partial = folder / f".model.onnx.{os.getpid()}"
    data = ""
    if sum(len(tensor.raw_data) for tensor in content.graph.initializer) > one_file_bytes:
        data = f"model.{secrets.token_hex(4)}.data"
    try:
        onnx.save(content, partial, save_as_external_data=bool(data), location=data or None, size_threshold=1024)
        partial.replace(folder / "model.onnx")
    except BaseException:
        partial.unlink(missing_ok=True)
        if data:
            (folder / data).unlink(missing_ok=True)
        raise
    for stale in folder.glob("model*.data"):
        if stale.name != data:
            stale.unlink()


def size_on_disk(folder: Path) -> int:
    """Return the bytes of `folder`/model.onnx and of its data."""
    return sum(file.stat().st_size for file in folder.glob("model*") if file.suffix in (".onnx", ".data"))


def record(model: onnx.ModelProto, how: Mapping[str, Any]) -> None:
    """Write into the ONNX metadata how the model was made, as JSON under "quantization"."""
    properties = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, properties | {RECORD: json.dumps(how)})


def recorded(model: onnx.ModelProto) -> dict[str, Any]:
    """Read what `record` wrote, {} without it."""
    text = next((entry.value for entry in model.metadata_props if entry.key == RECORD), "{}")
    how: dict[str, Any] = json.loads(text)
    return how


def opset(model: onnx.ModelProto) -> int:
    """Return the version of the standard operators that `model` uses."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def _require_unquantized(path: Path, model: onnx.ModelProto) -> None:
    operators = {node.op_type for node in model.graph.node}
    found = sorted(operator for operator in operators if QUANTIZED_OPERATORS.fullmatch(operator))
    if found:
        raise QuantizationError(f"{path} is quantized already: it has {', '.join(found)}; give the fp32 model")
    half = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    if any(tensor.data_type in half for tensor in model.graph.initializer):
        raise QuantizationError(f"{path} has 16-bit weights already; give the fp32 model")


def _with_opset(path: Path, model: onnx.ModelProto, upgrade: bool) -> onnx.ModelProto:
    version = opset(model)
    if version >= (UPGRADED_OPSET if upgrade else OLDEST_OPSET):
        return model
    if not upgrade:
        raise QuantizationError(
            f"{path} has opset {version}, the oldest that can be quantized is {OLDEST_OPSET}: "
            f"--upgrade-opset converts it to {UPGRADED_OPSET} first"
        )
    try:
        return version_converter.convert_version(model, UPGRADED_OPSET)
    except RuntimeError as error:
        raise QuantizationError(f"{path} cannot be converted to opset {UPGRADED_OPSET}: {error}") from error
