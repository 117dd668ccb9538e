"""Waits for the answer of echo (BLS) and returns it."""

import json

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests: list) -> list:
        return [self._answer(request) for request in requests]

    def _answer(self, request: object) -> object:
        call = pb_utils.InferenceRequest(
            model_name="echo",
            inputs=[pb_utils.get_input_tensor_by_name(request, "text_input")],
            requested_output_names=["text"],
            parameters=json.loads(request.parameters()),
        )
        return pb_utils.InferenceResponse(call.exec().output_tensors())
