"""Train the demo pair: a target that answers questions about the standard library, and a draft distilled from it.

    python -m scripts.train_demo_models [--work-dir DIR] [--minutes N]

Everything is made from the running interpreter's docstrings, with no download. Work is kept in --work-dir, and a
second start goes on where the first one stopped. scripts.export_model exports the result and
scripts.evaluate_demo_models measures it.
"""

import argparse
import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.demo_models import draft_prompts, samples, training
from scripts.demo_models.corpus import load_facts
from scripts.demo_models.phrasings import TRAINED
from scripts.demo_models.questions import trained_questions
from scripts.demo_models.tokenizer import END, PAD, load_tokenizer, train_tokenizer
from scripts.distillation import curve, precision
from scripts.distillation.on_policy import OnPolicy, Sampling
from scripts.distillation.settings import Settings, Weights
from scripts.distillation.trainer import Trainer

CONTEXT = 512
TARGET = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
TARGET |= {"head_dim": 64, "intermediate_size": 1536}
DRAFT = {"hidden_size": 160, "num_hidden_layers": 2, "num_attention_heads": 5, "num_key_value_heads": 1}
DRAFT |= {"head_dim": 32, "intermediate_size": 448}
TARGET_SHARE = 0.6  # of the time
QUESTIONS_PER_FACT = 45
HELD_OUT = 300  # prompts in phrasings that are never trained on
DRAFT_LEARNING: dict[str, Any] = {"peak_rate": 4e-3, "temperature": 1.0, "patience": 20, "weights": Weights(ce=0.0)}


def make_model(shape: dict[str, int], tokenizer: PreTrainedTokenizerFast, device: torch.device) -> LlamaForCausalLM:
    """Return a randomly initialised Llama model of that shape with tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        **shape,
    )
    return LlamaForCausalLM(config).to(device)


class Pair:
    """The target and the draft in the making, in one work folder."""

    def __init__(self, work_dir: Path, minutes: float, device: torch.device) -> None:
        self.work_dir = work_dir
        self.device = device
        self.seconds = minutes * 60
        work_dir.mkdir(parents=True, exist_ok=True)
        self.facts = load_facts(work_dir / "facts.jsonl")
        self.tokenizer = self._tokenizer()
        torch.manual_seed(0)
        self.target = make_model(TARGET, self.tokenizer, device)
        self.draft = make_model(DRAFT, self.tokenizer, device)

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        folder = self.work_dir / "tokenizer"
        if not folder.exists():
            texts = [f"{fact.name} {fact.answer}" for fact in self.facts]
            train_tokenizer([*texts, *TRAINED * 20]).save_pretrained(folder)
        return load_tokenizer(folder)

    def train(self) -> None:
        """Train the target, then the draft on the target's own answers, and store both as Hugging Face folders."""
        print(f"{len(self.facts)} facts, {self.device}", flush=True)
        if not (self.work_dir / "target" / "config.json").exists():
            self._train_target()
        self._distil_draft()

    def _train_target(self) -> None:
        print("target:", flush=True)
        rows = 256 if self.device.type == "cuda" else 64
        questions = trained_questions(self.facts, QUESTIONS_PER_FACT * len(self.facts), seed=1)
        singles = samples.single_turns(self.tokenizer, questions)
        chats = samples.chats(self.tokenizer, questions[: len(questions) // 8])
        batches = training.Batches([singles] * 7 + [chats], rows, self.device)
        schedule = training.Schedule(self.seconds * TARGET_SHARE, peak_rate=1.5e-3)
        progress = training.train(self.target, batches, schedule, self.work_dir / "target.pt")
        training.plot_curve(progress, self.work_dir / "target_loss.png")
        self._save(self.target, "target")

    def _distil_draft(self) -> None:
        """Distil on the policy of the target: see scripts.distillation.on_policy."""
        print("draft:", flush=True)
        dtype = precision.resolve("auto", self.device)
        target = self.load("target").to(dtype)
        on_gpu = self.device.type == "cuda"
        minutes = self.seconds / 60 * (1 - TARGET_SHARE)
        settings = Settings(minutes=minutes, rows=256 if on_gpu else 64, length=samples.ROW, **DRAFT_LEARNING)
        sampling = Sampling(pool=16384, tokens_at_once=400_000) if on_gpu else Sampling()
        prompts = draft_prompts.trained(self.tokenizer, self.facts, QUESTIONS_PER_FACT * len(self.facts))
        held_out = draft_prompts.unseen(self.tokenizer, self.facts, HELD_OUT)
        task = OnPolicy(target, prompts, held_out, settings, sampling, dtype)
        identity = {"settings": asdict(settings), "sampling": asdict(sampling), "draft": DRAFT}
        checkpoint = self.work_dir / "draft.pt"
        progress = Trainer(
            self.draft, task, settings, checkpoint, identity, lambda line: print(f"  {line}", flush=True)
        ).run()
        self._save(self.draft, "draft")
        curve.write(progress, self.work_dir / "draft_curve.json")
        curve.plot(progress, self.work_dir / "draft_loss.png", "draft")

    def _save(self, model: LlamaForCausalLM, role: str) -> None:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(self.work_dir / role)
        self.tokenizer.save_pretrained(self.work_dir / role)

    def load(self, role: str) -> LlamaForCausalLM:
        """Load a stored model."""
        model = LlamaForCausalLM.from_pretrained(self.work_dir / role, dtype=torch.float32)
        return model.to(self.device).eval()


def main() -> None:
    """Parse the command line and train."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path(".build/train"))
    parser.add_argument("--minutes", type=float, default=10 if device.type == "cuda" else 95)
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    pair = Pair(arguments.work_dir, arguments.minutes, device)
    pair.train()


if __name__ == "__main__":
    main()
