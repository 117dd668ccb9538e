"""One small real inference: the only proof that a model answers.

Triton's own readiness is not one: it stays 200 after a Python backend's process has died.
"""

import http.client
import json
import math
from typing import Any

PROMPT = b"ping"
TEXT_PARAMETERS = {"cache": "off", "max_tokens": 1}  # the least work, and nothing remembered of it
# Triton reports every failed inference as 400; only its words tell a dead backend process from a model that refuses.
DEAD_BACKEND = "is not healthy"
WIDTHS = {
    "TYPE_BOOL": 1, "TYPE_UINT8": 1, "TYPE_INT8": 1, "TYPE_UINT16": 2, "TYPE_INT16": 2, "TYPE_FP16": 2, "TYPE_BF16": 2,
    "TYPE_UINT32": 4, "TYPE_INT32": 4, "TYPE_FP32": 4, "TYPE_UINT64": 8, "TYPE_INT64": 8, "TYPE_FP64": 8,
}  # fmt: skip


class NotReady(Exception):  # noqa: N818 - a state, not an error of the caller
    """Why the server or a model does not answer, in one line."""


def model_config(url: str, model: str, timeout: float) -> dict[str, Any]:
    """Return the configuration, completed by Triton, of `model` at `url` (host:port). Raises NotReady."""
    status, body = _exchange(url, "GET", f"/v2/models/{model}/config", timeout=timeout)
    if status != http.HTTPStatus.OK:
        raise NotReady(f"model {model} is not loaded")
    config: dict[str, Any] = json.loads(body)
    return config


def ask_server(url: str, timeout: float) -> None:
    """Raise NotReady unless the server at `url` says that it and all its models are ready."""
    status, _ = _exchange(url, "GET", "/v2/health/ready", timeout=timeout)
    if status != http.HTTPStatus.OK:
        raise NotReady("the server is not ready")


def ask_model(url: str, config: dict[str, Any], timeout: float) -> None:
    """Raise NotReady unless the model with this configuration answers a request made from it.

    The request holds the smallest tensor of each input that is not optional: b"ping" or ones. A refusal by the model's
    own code is an answer too: it proves that the process lives.
    """
    inputs = [tensor for tensor in config["input"] if not tensor.get("optional")]
    parameters = TEXT_PARAMETERS if any(tensor["name"] == "text_input" for tensor in inputs) else {}
    path = f"/v2/models/{config['name']}"
    if config.get("model_transaction_policy", {}).get("decoupled"):
        fields = {tensor["name"]: PROMPT.decode() if tensor["data_type"] == "TYPE_STRING" else 1 for tensor in inputs}
        answer = _exchange(
            url, "POST", f"{path}/generate_stream", json.dumps({**fields, **parameters}).encode(), timeout
        )
    else:
        body, headers = _infer_request(inputs, config["max_batch_size"], parameters)
        answer = _exchange(url, "POST", f"{path}/infer", body, timeout, headers)
    _judge(config["name"], *answer)


def ask_all(url: str, models: list[str], timeout: float) -> None:
    """Raise NotReady unless the server at `url` and each of `models` answer; `timeout` seconds for each step."""
    ask_server(url, timeout)
    for model in models:
        ask_model(url, model_config(url, model, timeout), timeout)


def _infer_request(
    inputs: list[dict[str, Any]], max_batch_size: int, parameters: dict[str, Any]
) -> tuple[bytes, dict[str, str]]:
    """Return body and headers of an /infer request, with the tensors as bytes: JSON has no half floats."""
    described, tensors = [], b""
    for tensor in inputs:
        shape = [1] * (max_batch_size > 0) + [max(1, int(size)) for size in tensor["dims"]]
        data = _element(tensor["data_type"]) * math.prod(shape)
        datatype = tensor["data_type"].removeprefix("TYPE_").replace("STRING", "BYTES")
        described.append(
            {
                "name": tensor["name"],
                "shape": shape,
                "datatype": datatype,
                "parameters": {"binary_data_size": len(data)},
            }
        )
        tensors += data
    head = json.dumps({"inputs": described, "parameters": parameters}).encode()
    return head + tensors, {"Inference-Header-Content-Length": str(len(head))}


def _element(data_type: str) -> bytes:
    if data_type == "TYPE_STRING":
        return len(PROMPT).to_bytes(4, "little") + PROMPT
    return (1).to_bytes(WIDTHS[data_type], "little")  # for floats the smallest positive number: as good as any


def _judge(model: str, status: int, body: bytes) -> None:
    if status == http.HTTPStatus.OK:
        return
    text = body.decode(errors="replace").strip()
    if status != http.HTTPStatus.BAD_REQUEST or DEAD_BACKEND in text:
        raise NotReady(f"model {model} does not answer: {text or http.HTTPStatus(status).phrase}")


def _exchange(
    url: str, method: str, path: str, body: bytes = b"", timeout: float = 10.0, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(url, timeout=timeout)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException) as error:
        raise NotReady(f"no answer from {url}{path}: {error}") from error
    finally:
        connection.close()
