"""What Triton's requests hold as plain values, and plain values as its responses."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from speculative_decoding.validation import InvalidOptionError

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


def text_input(request: Any, name: str) -> str:
    """Return the one string in an optional input, '' without it. Raises InvalidOptionError."""
    element = _only_element(request, name)
    if element is None:
        return ""
    try:
        return bytes(element).decode()
    except UnicodeDecodeError as error:
        raise InvalidOptionError(f"{name} is not valid UTF-8: {error.reason} at byte {error.start}") from error


def flag_input(request: Any, name: str) -> bool | None:
    """Return the one boolean in an optional input, None without it. Raises InvalidOptionError."""
    element = _only_element(request, name)
    return None if element is None else bool(element)


def object_input(request: Any, name: str) -> dict[str, Any]:
    """Return the JSON object in an optional input, {} without it. Raises InvalidOptionError."""
    text = text_input(request, name)
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidOptionError(f"{name} is {text!r}; it must be a JSON object")
    return value


def text_tensor(name: str, texts: Sequence[str]) -> Any:
    """Return a string output of one row."""
    return pb_utils.Tensor(name, np.array([[text.encode() for text in texts]], np.object_))


def number_tensor(name: str, numbers: Sequence[float], kind: type[np.generic]) -> Any:
    """Return a numeric output of one row."""
    return pb_utils.Tensor(name, np.array([numbers], kind))


def respond(sender: Any, texts: Sequence[str], info: str, more: Mapping[str, Any], flags: int = 0) -> None:
    """Send text_output, info and the tensors `more`."""
    # Held until send() has returned: it drops outputs that were not asked for, and would free them without the GIL
    # (tritonserver 2.51; mended in python_backend #390).
    tensors = [text_tensor("text_output", texts), text_tensor("info", [info]), *more.values()]
    sender.send(pb_utils.InferenceResponse(tensors), flags=flags)


def send_error(sender: Any, message: str, code: int) -> None:
    """Send an error as the last response."""
    sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code)), flags=FINAL)


def _only_element(request: Any, name: str) -> Any:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    elements = tensor.as_numpy().ravel()
    if elements.size != 1:
        raise InvalidOptionError(f"{name} has {elements.size} elements; it must have one")
    return elements[0]
