"""Inputs and outputs: what the graph has, what the config says, and completing the one from the other.

Follows Triton's C++ ONNX Runtime backend, error messages included, so that a config that loads here loads there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# ONNX Runtime's name of a type -> Triton's. Neither the C++ backend nor numpy has bfloat16.
TRITON_TYPES = {
    "tensor(bool)": "TYPE_BOOL",
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(uint16)": "TYPE_UINT16",
    "tensor(uint32)": "TYPE_UINT32",
    "tensor(uint64)": "TYPE_UINT64",
    "tensor(int8)": "TYPE_INT8",
    "tensor(int16)": "TYPE_INT16",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int64)": "TYPE_INT64",
    "tensor(float16)": "TYPE_FP16",
    "tensor(float)": "TYPE_FP32",
    "tensor(double)": "TYPE_FP64",
    "tensor(string)": "TYPE_STRING",
}
VARIABLE = -1


@dataclass(frozen=True)
class GraphTensor:
    """An input or output of the graph; a dimension of -1 is variable."""

    name: str
    data_type: str
    shape: tuple[int, ...]

    @staticmethod
    def of(argument: Any) -> "GraphTensor":
        """Read an `onnxruntime.NodeArg`. Raises ValueError for a type that Triton's backend does not serve."""
        if argument.type not in TRITON_TYPES:
            raise ValueError(f"unsupported datatype {argument.type} for tensor '{argument.name}'")
        shape = tuple(size if isinstance(size, int) else VARIABLE for size in argument.shape)
        return GraphTensor(argument.name, TRITON_TYPES[argument.type], shape)


@dataclass(frozen=True)
class Signature:
    """The tensors of a graph. Initializers that a request may override are `optional` inputs."""

    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]
    optional: tuple[GraphTensor, ...] = ()

    @property
    def batches(self) -> bool:
        """Whether every tensor can have a batch dimension in front."""
        return all(tensor.shape[:1] == (VARIABLE,) for tensor in (*self.inputs, *self.outputs))


def complete(config: dict[str, Any], signature: Signature, default_max_batch_size: int) -> None:
    """Fill in, in place, what `config` leaves out: inputs, outputs, max_batch_size and the dynamic batcher.

    A config that has both inputs and outputs is left alone. Raises ValueError when it asks for batches that the graph
    cannot do.
    """
    if config["input"] and config["output"]:
        return
    if signature.batches:
        config["max_batch_size"] = config["max_batch_size"] or max(default_max_batch_size, 0)
        if config["max_batch_size"] > 1 and "sequence_batching" not in config:
            config.setdefault("dynamic_batching", {})
    elif config["max_batch_size"]:
        raise ValueError(
            f"autofill failed for model '{config['name']}': model does not support batching while non-zero "
            "max_batch_size is specified"
        )
    batched = config["max_batch_size"] > 0
    config["input"] = config["input"] or [_entry(tensor, batched) for tensor in signature.inputs]
    config["output"] = config["output"] or [_entry(tensor, batched) for tensor in signature.outputs]


def _entry(tensor: GraphTensor, batched: bool) -> dict[str, Any]:
    dims = list(tensor.shape[1:] if batched else tensor.shape)
    entry: dict[str, Any] = {"name": tensor.name, "data_type": tensor.data_type, "dims": dims or [1]}
    if batched and not dims:
        entry["reshape"] = {"shape": []}
    return entry


def validate(config: dict[str, Any], signature: Signature) -> None:
    """Raise ValueError, naming the tensor, when inputs or outputs of `config` do not fit the graph."""
    for field in ("batch_input", "batch_output", "sequence_batching"):
        if config.get(field):
            raise ValueError(f"model '{config['name']}': {field} needs Triton's C++ onnxruntime backend")
    required = [entry for entry in config["input"] if not entry.get("optional")]
    if len(required) != len(signature.inputs):
        raise ValueError(
            f"unable to load model '{config['name']}', configuration expects {len(required)} inputs, "
            f"model provides {len(signature.inputs)}"
        )
    for entry in config["input"]:
        if entry.get("optional") and config["max_batch_size"]:
            raise ValueError(
                f"unable to load model '{config['name']}', optional input '{entry['name']}' is not supported for "
                "models that support batching"
            )
        _validate(config, "input", entry, (*signature.inputs, *signature.optional))
    for entry in config["output"]:
        _validate(config, "output", entry, signature.outputs)


def _validate(config: dict[str, Any], direction: str, entry: dict[str, Any], tensors: Sequence[GraphTensor]) -> None:
    name = entry["name"]
    tensor = next((tensor for tensor in tensors if tensor.name == name), None)
    if tensor is None:
        allowed = ", ".join(tensor.name for tensor in tensors)
        raise ValueError(f"unexpected inference {direction} '{name}', allowed {direction}s are: {allowed}")
    if entry.get("allow_ragged_batch"):
        raise ValueError(f"input '{name}': allow_ragged_batch needs Triton's C++ onnxruntime backend")
    if entry["data_type"] != tensor.data_type:
        raise ValueError(
            f"unable to load model '{config['name']}', configuration expects datatype {entry['data_type']} for "
            f"{direction} '{name}', model provides {tensor.data_type}"
        )
    _validate_dims(config, entry, tensor, exact=direction == "output")


def _validate_dims(config: dict[str, Any], entry: dict[str, Any], tensor: GraphTensor, exact: bool) -> None:
    """Compare dims; an input may narrow a variable dimension of the graph, an output must repeat it (`exact`)."""
    batched = config["max_batch_size"] > 0
    dims = entry["reshape"].get("shape", []) if "reshape" in entry else entry["dims"]
    expected = [VARIABLE, *dims] if batched else list(dims)
    if not tensor.shape and not batched and all(size == 1 for size in dims):
        return
    fits = len(expected) == len(tensor.shape) and all(
        size == wanted or (size == VARIABLE and not exact) for size, wanted in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        batch = "; its first is the batch dimension, because max_batch_size > 0" if batched else ""
        raise ValueError(
            f"model '{config['name']}', tensor '{tensor.name}': the model expects {len(tensor.shape)} dimensions "
            f"(shape {list(tensor.shape)}) but the model configuration specifies {len(expected)} dimensions (shape "
            f"{expected}{batch})"
        )
