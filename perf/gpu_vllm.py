"""vLLM decodes perf.gpu's target, same prompts, same number of tokens: `python perf/gpu_vllm.py PAIR`, JSON out.

It runs in an environment of vLLM's own, which pins its torch, and so imports nothing of this project. In half
precision, greedily, with the pair's draft where --draft-tokens says how many it proposes.
"""

import argparse
import importlib
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

AT_ONCE = (1, 8, 32, 64)
CONTEXT = 2048
MEMORY = 0.35  # of the GPU
TURNS = 5


def tokens_per_s(model: Any, prompts: list[list[int]], at_once: int, new_tokens: int) -> float:
    """Return new tokens a second, prefill included: the median of TURNS calls, after two that do not count."""
    vllm = importlib.import_module("vllm")
    wish = vllm.SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    times = []
    for begin in range(0, (2 + TURNS) * at_once, at_once):
        asked = [{"prompt_token_ids": prompt} for prompt in prompts[begin : begin + at_once]]
        began = time.perf_counter()
        answers = model.generate(asked, wish, use_tqdm=False)
        times.append(time.perf_counter() - began)
        assert sum(len(answer.outputs[0].token_ids) for answer in answers) == at_once * new_tokens
    return round(at_once * new_tokens / statistics.median(times[2:]), 1)


def main() -> None:
    """Measure, and print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", type=Path)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--draft-tokens", type=int, default=0)
    arguments = parser.parse_args()
    vllm = importlib.import_module("vllm")
    speculation: dict[str, Any] = {}
    if arguments.draft_tokens:
        draft = {"method": "draft_model", "model": str(arguments.pair / "draft"), "max_model_len": CONTEXT}
        draft |= {"num_speculative_tokens": arguments.draft_tokens}
        speculation = {"speculative_config": draft, "max_num_batched_tokens": 2 * CONTEXT}
    model = vllm.LLM(
        model=str(arguments.pair / "target"),
        skip_tokenizer_init=True,
        dtype="float16",
        max_model_len=CONTEXT,
        max_num_seqs=max(AT_ONCE),
        gpu_memory_utilization=MEMORY,
        enable_prefix_caching=False,
        **speculation,
    )
    prompts = json.loads((arguments.pair / "prompts.json").read_text())["prompts"]
    name = f"vLLM {vllm.__version__}" + (", draft model" if arguments.draft_tokens else "")
    found = {str(rows): tokens_per_s(model, prompts, rows, arguments.new_tokens) for rows in AT_ONCE}
    print("\n" + json.dumps({name: found}), flush=True)
    os._exit(0)  # its threads would keep the process


if __name__ == "__main__":
    main()
