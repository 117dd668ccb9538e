"""Returns its text; the parameter `wait_s` makes it wait idly first, `work_s` makes it compute."""

import json
import time

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests: list) -> list:
        return [self._answer(request) for request in requests]

    def _answer(self, request: object) -> object:
        parameters = json.loads(request.parameters())
        time.sleep(parameters.get("wait_s", 0))
        end = time.monotonic() + parameters.get("work_s", 0)
        while time.monotonic() < end:
            pass
        text = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy()
        return pb_utils.InferenceResponse([pb_utils.Tensor("text", text)])
