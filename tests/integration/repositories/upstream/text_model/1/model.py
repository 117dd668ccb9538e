"""Says how often it was asked, slowly, and what it was asked with; the prompts "fail" and "fail later" make it fail."""

import itertools
import json
import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
cancelled: list[str] = []


class TritonPythonModel:
    def initialize(self, args: dict) -> None:
        self.count = itertools.count(1)

    def execute(self, requests: list) -> None:
        for request in requests:
            prompt = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy().ravel()[0].decode()
            parameters = json.loads(request.parameters() or "{}")
            arguments = (request.get_response_sender(), prompt, parameters, next(self.count))
            threading.Thread(target=answer, args=arguments).start()


def answer(sender: object, prompt: str, parameters: dict, number: int) -> None:
    if prompt == "fail":
        fail(sender)
        sender.send(flags=FINAL)
        return
    said = f"answer {number} to {prompt} at most {parameters.get('max_tokens')} .".split()
    if prompt == "how many were cancelled":
        said = [str(len(cancelled))]
    for count, word in enumerate(said * (500 if prompt == "talk for long" else 1)):
        time.sleep(0.02)
        if sender.is_cancelled():
            cancelled.append(prompt)
            break
        if prompt == "fail later" and count == 4:
            fail(sender)
            break
        text = pb_utils.Tensor("text_output", np.array([f"{word} ".encode()], np.object_))
        sender.send(pb_utils.InferenceResponse([text]))
    sender.send(flags=FINAL)


def fail(sender: object) -> None:
    sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError("out of memory")))
