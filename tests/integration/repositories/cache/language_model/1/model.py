"""Sends a cached answer on, or makes one up, streams it word by word if asked, and stores it.

The answer is stored before the last response, so that a client that has it knows that it is durable.
"""

import json
import threading
import uuid

import numpy as np
import triton_python_backend_utils as pb_utils

INPUTS = ("text_input", "cached_output", "cache_entry", "cache_info")
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def execute(self, requests: list) -> None:
        for request in requests:
            prompt, cached, entry, info = (text(request, name) for name in INPUTS)
            sender = request.get_response_sender()
            if cached:
                sender.send(response(cached, info), flags=FINAL)
                continue
            asked = json.loads(request.parameters() or "{}")
            order = (asked.get("stream", False), asked.get("store_later", False))
            threading.Thread(target=decode, args=(sender, prompt, entry, info, *order)).start()


def decode(sender: object, prompt: str, entry: str, info: str, streams: bool, stores_later: bool) -> None:
    """Answer, and store the answer: before, so that who has it may count on the cache, or later as the real one."""
    answer = f"{prompt} is {uuid.uuid4().hex} ."
    for word in answer.split()[:-1] if streams else []:
        sender.send(response(word + " ", "{}"))
    if entry and not stores_later:
        store(entry, answer)
    sender.send(response("." if streams else answer, info), flags=FINAL)
    if entry and stores_later:
        store(entry, answer)


def store(entry: str, answer: str) -> None:
    texts = {"text_input": "", "cache_entry": entry, "answer": answer, "answer_info": '{"tokens": 4}'}
    reply = pb_utils.InferenceRequest(
        model_name="semantic_cache",
        requested_output_names=["cache_info"],
        inputs=[tensor(name, value) for name, value in texts.items()],
    ).exec()
    assert not reply.has_error(), reply.error().message()


def text(request: object, name: str) -> str:
    found = pb_utils.get_input_tensor_by_name(request, name)
    return found.as_numpy()[0, 0].decode() if found else ""


def tensor(name: str, value: str) -> object:
    return pb_utils.Tensor(name, np.array([[value.encode()]], dtype=object))


def response(answer: str, info: str) -> object:
    return pb_utils.InferenceResponse([tensor("text_output", answer), tensor("info", info)])
