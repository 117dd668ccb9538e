"""Others decode perf.gpu's target, same prompts, same number of tokens: `python -m perf.gpu_peers PAIR`, JSON out.

ONNX Runtime GenAI with a folder of its own builder, and transformers, assisted by the draft, and plain with a static
cache, compiled; in half precision, greedily.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import onnxruntime
import torch
from transformers import LlamaForCausalLM, StaticCache

NEW_TOKENS = 96
AT_ONCE = (1, 8, 32)
STATIC = (1, 8)
TURNS = 5

Generate = Callable[[Sequence[list[int]]], None]


def genai(folder: Path) -> Generate:
    """Return what decodes rows of equal length with a GenAI folder."""
    onnxruntime.preload_dlls()  # CUDA's, where Python packages brought them
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder))

    def generate(prompts: Sequence[list[int]]) -> None:
        parameters = onnxruntime_genai.GeneratorParams(model)
        length = len(prompts[0]) + NEW_TOKENS
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=len(prompts))
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens([token for prompt in prompts for token in prompt])
        while not generator.is_done():
            generator.generate_next_token()

    return generate


def assisted(model: LlamaForCausalLM, draft: LlamaForCausalLM) -> Generate:
    """Return the same with transformers' assisted generation, of one row."""

    def generate(prompts: Sequence[list[int]]) -> None:
        ids = torch.tensor(prompts, device="cuda")
        lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, assistant_model=draft, **lengths)
        torch.cuda.synchronize()

    return generate


def compiled(model: LlamaForCausalLM) -> Generate:
    """Return the same with transformers' static cache and torch.compile, with CUDA graphs of its own.

    Not through generate(), where a graph's output is read after the next graph has overwritten it.
    """
    step = torch.compile(model, mode="reduce-overhead")
    caches: dict[int, StaticCache] = {}

    @torch.no_grad()
    def generate(prompts: Sequence[list[int]]) -> None:
        ids = torch.tensor(prompts, device=model.device)
        rows, length = ids.shape
        cache = caches.setdefault(rows, StaticCache(config=model.config, max_cache_len=length + NEW_TOKENS))
        cache.reset()
        positions = torch.arange(length, device=model.device).expand(rows, -1)
        token = model(ids, past_key_values=cache, position_ids=positions).logits[:, -1:].argmax(-1)
        for place in range(length, length + NEW_TOKENS - 1):
            torch.compiler.cudagraph_mark_step_begin()
            here = torch.full((rows, 1), place, device=model.device)
            token = step(token, past_key_values=cache, position_ids=here).logits[:, -1:].argmax(-1)
        token.tolist()

    return generate


def tokens_per_s(generate: Generate, prompts: Sequence[list[int]], at_once: int) -> float:
    """Return new tokens a second, prefill included: the median of TURNS calls, after two that do not count."""
    times = []
    for begin in range(0, (2 + TURNS) * at_once, at_once):
        began = time.perf_counter()
        generate(prompts[begin : begin + at_once])
        times.append(time.perf_counter() - began)
    return round(at_once * NEW_TOKENS / statistics.median(times[2:]), 1)


def measure(prompts: Sequence[list[int]], rows: Sequence[int], make: Callable[[], Generate]) -> dict[str, float | str]:
    """Return tokens a second by rows at once; what went wrong where a peer fails."""
    try:
        decode = make()
        return {str(count): tokens_per_s(decode, prompts, count) for count in rows}
    except Exception as error:  # a peer that does not run here must not cost the others' figures
        return {"error": f"{type(error).__name__}: {error}"[:200]}


def main() -> None:
    """Measure, and print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pair", type=Path)
    pair = parser.parse_args().pair
    prompts = json.loads((pair / "prompts.json").read_text())["prompts"]
    found: dict[str, dict[str, float | str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "genai"
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(pair / "target")]
        command += ["-o", str(folder), "-p", "fp16", "-e", "cuda", "-c", f"{scratch}/cache"]
        subprocess.run(command, capture_output=True, check=True)
        found["ONNX Runtime GenAI"] = measure(prompts, AT_ONCE, lambda: genai(folder))
    target, draft = (
        LlamaForCausalLM.from_pretrained(pair / name, dtype=torch.float16).cuda().eval() for name in ("target", "draft")
    )
    found["transformers, assisted generation"] = measure(prompts, (1,), lambda: assisted(target, draft))
    found["transformers, torch.compile"] = measure(prompts, STATIC, lambda: compiled(target))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
