"""Train the pair that perf.gpu decodes with, on the Python sources of this machine: `python -m perf.gpu_pair FOLDER`.

A target of 0.28B parameters learns the standard library and the installed packages, then a draft of 10M learns the
target's distribution, three minutes in all on an H100. Some files are held out of both: perf.gpu's prompts begin them.
FOLDER gets 1/target and 1/draft, exported for CUDA, prompts.json, and Hugging Face folders of both.
"""

import argparse
import copy
import hashlib
import itertools
import json
import math
import random
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.export_model import export_for_cuda

END = "<|end|>"
VOCABULARY = 8192
CONTEXT = 2048
ROW, ROWS = 1024, 32  # tokens of a row, rows of a step
TARGET = {"hidden_size": 960, "num_hidden_layers": 28, "num_attention_heads": 15, "num_key_value_heads": 5}
TARGET |= {"head_dim": 64, "intermediate_size": 2560}
DRAFT = {"hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}
DRAFT |= {"head_dim": 64, "intermediate_size": 1536}
TARGET_SHARE = 0.55  # of the time
RATES = {"target": 8e-4, "draft": 3e-3}
WARM_UP = 0.03
MOST_BYTES = 200_000  # of a file: longer ones are tables
FILES, TOKENIZER_FILES = 14_000, 1500
HELD_OUT = 0.02  # of the files
PROMPTS, PROMPT_TOKENS = 1000, 64


def sources() -> tuple[list[str], list[str]]:
    """Return the texts to learn and those held out, in an order that does not depend on where the files are."""
    texts: dict[str, str] = {}
    for folder in {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")} | set(sys.path):
        for file in Path(folder).rglob("*.py") if folder and Path(folder).is_dir() else ():
            try:
                text = file.read_text(encoding="utf-8") if file.stat().st_size <= MOST_BYTES else ""
            except (OSError, UnicodeDecodeError):
                continue
            if len(text) > 200:
                texts[hashlib.sha256(text.encode()).hexdigest()] = text
    ordered = [texts[name] for name in sorted(texts)]
    held_out = int(HELD_OUT * len(ordered))
    return ordered[held_out:], ordered[:held_out]


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of VOCABULARY tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def rows_of(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """Return all texts, one after another, as int16 [rows, ROW] on the GPU."""
    end = tokenizer.convert_tokens_to_ids(END)
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(texts))
    flat = np.concatenate([np.array([*one.ids, end], np.int16) for one in encoded])
    return torch.from_numpy(flat[: len(flat) // ROW * ROW].reshape(-1, ROW)).cuda()


def make_model(shape: dict[str, int]) -> LlamaForCausalLM:
    """Return a randomly initialised Llama model of that shape, whose layers are compiled: once for all of them."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        attn_implementation="sdpa",
        **shape,
    )
    model = LlamaForCausalLM(config).cuda()
    for layer in model.model.layers:
        layer.compile()
    return model


def logits_of(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Return the logits after each of `tokens`, in the model's precision."""
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    logits: Tensor = model.lm_head(hidden)
    return logits


def train(
    name: str, model: LlamaForCausalLM, rows: Tensor, seconds: float, loss_of: Callable[[Tensor], Tensor]
) -> None:
    """Train `model` in place for so many seconds; `loss_of` maps tokens [rows, ROW] to the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATES[name], betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    loss_of(_draw(rows)).backward()  # compiles, off the clock
    optimizer.zero_grad(set_to_none=True)
    began = shown = time.monotonic()
    for step in itertools.count(1):
        progress = (time.monotonic() - began) / seconds
        if progress >= 1:
            break
        share = progress / WARM_UP if progress < WARM_UP else 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = RATES[name] * share
        loss = loss_of(_draw(rows))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            loss.item()  # do not run ahead of the clock
        if time.monotonic() - shown > 15:
            shown = time.monotonic()
            speed = step * ROWS * ROW / (shown - began)
            print(
                f"{name}: {shown - began:.0f} s, {step} steps, {speed:,.0f} tokens/s, loss {loss.item():.3f}",
                flush=True,
            )


def _draw(rows: Tensor) -> Tensor:
    return rows[torch.randint(len(rows), (ROWS,), device="cuda")].long()


def train_target(rows: Tensor, seconds: float) -> LlamaForCausalLM:
    """Return a model of the text."""
    target = make_model(TARGET)

    def predict(tokens: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            logits = logits_of(target, tokens[:, :-1])
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    train("target", target, rows, seconds, predict)
    return target.eval()


def train_draft(target: LlamaForCausalLM, rows: Tensor, seconds: float) -> LlamaForCausalLM:
    """Return a draft distilled from the target."""
    draft = make_model(DRAFT)

    def imitate(tokens: Tensor) -> Tensor:
        tokens = tokens[:, :-1]  # as many as the target has been compiled for
        with torch.autocast("cuda", torch.bfloat16):
            with torch.no_grad():
                wanted = logits_of(target, tokens).float().log_softmax(-1)
            got = logits_of(draft, tokens).float().log_softmax(-1)
        return nn.functional.kl_div(got.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean")

    train("draft", draft, rows, seconds, imitate)
    return draft.eval()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face folder of the model in half precision; the model stays as it is."""
    copy.deepcopy(model).to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def compare(target: LlamaForCausalLM, draft: LlamaForCausalLM, rows: Tensor) -> dict[str, float]:
    """Return what held-out text says: each model's loss, and how often their likeliest tokens agree."""
    losses, agreed = {"target": 0.0, "draft": 0.0}, 0.0
    some = rows[: 2 * ROWS].split(ROWS)
    for part in some:
        tokens, likeliest = part.long(), []
        for name, model in (("target", target), ("draft", draft)):
            with torch.autocast("cuda", torch.bfloat16):
                logits = logits_of(model, tokens[:, :-1]).float()
            losses[name] += nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
            likeliest.append(logits.argmax(-1))
        agreed += (likeliest[0] == likeliest[1]).float().mean().item()
    return {name: round(value / len(some), 3) for name, value in {**losses, "agreement": agreed}.items()}


def prompts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Iterator[list[int]]:
    """Yield PROMPT_TOKENS tokens from somewhere within each text, again and again."""
    rng = random.Random(0)
    encoded = [one.ids for one in tokenizer.backend_tokenizer.encode_batch_fast(list(texts))]
    long = [ids for ids in encoded if len(ids) >= 4 * PROMPT_TOKENS]
    while True:
        for ids in long:
            begin = rng.randrange(len(ids) - 2 * PROMPT_TOKENS)
            yield ids[begin : begin + PROMPT_TOKENS]


def main() -> None:
    """Parse the command line, train, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=1.9, help="of training alone")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    learned, held_out = sources()
    learned = random.Random(0).sample(learned, min(FILES, len(learned)))
    print(f"{len(learned)} files, {sum(map(len, learned)) / 1e6:.0f} MB; {len(held_out)} held out", flush=True)
    tokenizer = train_tokenizer(learned[:TOKENIZER_FILES])
    rows = rows_of(tokenizer, learned)
    print(f"{rows.numel() / 1e6:.0f}M tokens", flush=True)
    folder, seconds = arguments.folder, 60 * arguments.minutes
    torch.manual_seed(0)
    target = train_target(rows, TARGET_SHARE * seconds)
    save(target, tokenizer, folder / "target")
    with ThreadPoolExecutor(1) as exporting:  # while the draft is being trained
        exported = exporting.submit(export_for_cuda, folder / "target", folder / "1" / "target")
        draft = train_draft(target, rows, (1 - TARGET_SHARE) * seconds)
        exported.result()
    save(draft, tokenizer, folder / "draft")
    export_for_cuda(folder / "draft", folder / "1" / "draft")
    found = compare(target, draft, rows_of(tokenizer, held_out))
    print(f"held out: {found}", flush=True)
    chosen = list(itertools.islice(prompts(tokenizer, held_out), PROMPTS))
    sizes = {"target": target.num_parameters(), "draft": draft.num_parameters()}
    record = {"prompts": chosen, "parameters": sizes, "tokens": rows.numel(), "held_out": found}
    (folder / "prompts.json").write_text(json.dumps(record))
    print(f"{folder}: {sizes} parameters", flush=True)


if __name__ == "__main__":
    main()
