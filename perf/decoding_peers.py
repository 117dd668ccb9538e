"""The other decoders that perf.speculative measures: ONNX Runtime GenAI and transformers, one sequence at a time."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnxruntime_genai
import torch
from transformers import LlamaForCausalLM

Generate = Callable[[list[int], int], list[int]]  # prompt, most new tokens -> new tokens
DRAFT_TOKENS = 4  # GenAI's default
NGRAM = 3


def build_int4(source: Path, folder: Path) -> None:
    """Export the Hugging Face folder `source` as ONNX Runtime GenAI's own builder does, in int4."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(folder)]
    command += ["-p", "int4", "-e", "cpu", "-c", str(folder.with_name("cache")), "--extra_options"]
    subprocess.run([*command, "int4_accuracy_level=4"], capture_output=True, check=True)


def genai(folder: Path, **speculative: float | bool) -> Generate:
    """Decode greedily with a GenAI folder; `speculative` are GenAI's speculative options."""
    model = onnxruntime_genai.Model(str(folder))

    def generate(prompt: list[int], most: int) -> list[int]:
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + most, do_sample=False)
        if speculative:
            parameters.set_speculative_options(**speculative)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        return list(generator.get_sequence(0))[len(prompt) :]

    return generate


def with_draft(target: Path, draft: Path, folder: Path) -> Path:
    """Return a new GenAI folder that decodes `target` with the help of `draft`."""
    shutil.copytree(target, folder)
    shutil.copytree(draft, folder / "draft")
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    decoder = json.loads((draft / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    config["model"]["draft"] = decoder | {"filename": "draft/model.onnx"}
    (folder / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def transformers(model: LlamaForCausalLM, draft: LlamaForCausalLM | None = None) -> Generate:
    """Decode greedily with transformers, in fp32; with a draft it is assisted generation."""

    def generate(prompt: list[int], most: int) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            answer = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=most,
                do_sample=False,
                assistant_model=draft,
            )
        return answer[0, len(prompt) :].tolist()

    return generate
