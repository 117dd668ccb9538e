"""Train the demo pair: a target that answers questions about the standard library, and a draft distilled from it.

    python -m scripts.train_demo_models [--work-dir DIR] [--minutes N]

Everything is made from the running interpreter's docstrings, with no download. Work is kept in --work-dir, and a
second start goes on where the first one stopped. scripts.export_model exports the result and
scripts.evaluate_demo_models measures it.
"""

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.demo_models import answering, samples, training
from scripts.demo_models.corpus import load_facts
from scripts.demo_models.phrasings import OFF_TOPIC_ANSWER, TRAINED
from scripts.demo_models.questions import Question, sample_questions, trained_questions
from scripts.demo_models.tokenizer import END, PAD, load_tokenizer, train_tokenizer

CONTEXT = 512
TARGET = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
TARGET |= {"head_dim": 64, "intermediate_size": 1536}
DRAFT = {"hidden_size": 160, "num_hidden_layers": 2, "num_attention_heads": 5, "num_key_value_heads": 1}
DRAFT |= {"head_dim": 32, "intermediate_size": 448}
TARGET_SHARE = 0.6  # of the time
QUESTIONS_PER_FACT = 45


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
        rows = 256 if self.device.type == "cuda" else 64
        questions = trained_questions(self.facts, QUESTIONS_PER_FACT * len(self.facts), seed=1)
        print(f"{len(self.facts)} facts, {len(questions)} questions, {self.device}", flush=True)
        if not (self.work_dir / "target" / "config.json").exists():
            schedule = training.Schedule(self.seconds * TARGET_SHARE, peak_rate=1.5e-3)
            self._train("target", questions, rows, schedule)
        self.target = self.load("target")
        own = self._own_answers()
        distilled = [Question(question.prompt, own[question.answer]) for question in questions]
        schedule = training.Schedule(self.seconds * (1 - TARGET_SHARE), peak_rate=4e-3, weight_decay=0.0)
        self._train("draft", distilled, rows, schedule, self.agreement(200))
        training.plot_curves(self.work_dir, ("target", "draft"))

    def _train(
        self,
        role: str,
        questions: Sequence[Question],
        rows: int,
        schedule: training.Schedule,
        measure: Callable[[], float] | None = None,
    ) -> None:
        print(f"{role}:", flush=True)
        model = getattr(self, role)
        singles = samples.single_turns(self.tokenizer, questions)
        chats = samples.chats(self.tokenizer, questions[: len(questions) // 8])
        batches = training.Batches([singles] * 7 + [chats], rows, self.device)
        progress = training.train(model, batches, schedule, self.work_dir / f"{role}.pt", measure)
        training.save_curve(progress, self.work_dir, role)
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(self.work_dir / role)
        self.tokenizer.save_pretrained(self.work_dir / role)

    def _own_answers(self) -> dict[str, str]:
        """Return, for every answer there is, what the target greedily answers to a question it should answer so.

        A draft that learns these learns the target's own words (sequence-level distillation, Kim and Rush 2016).
        """
        path = self.work_dir / "own_answers.json"
        if not path.exists():
            wanted = [fact.answer for fact in self.facts]
            prompts = [TRAINED[0].format(n=fact.name) for fact in self.facts]
            print("asking the target ...", flush=True)
            asked = [Question(prompt, answer) for prompt, answer in zip(prompts, wanted, strict=True)]
            given = answering.own_answers(self.target, self.tokenizer, asked)
            own = dict(zip(wanted, given, strict=True)) | {OFF_TOPIC_ANSWER: OFF_TOPIC_ANSWER}
            path.write_text(json.dumps(own), encoding="utf-8")
        answers: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        return answers

    def agreement(self, count: int) -> Callable[[], float]:
        """Return a function that gives the share of the target's greedy tokens on unseen phrasings the draft picks."""
        questions = sample_questions(self.facts, count, unseen=True, seed=3)
        prompts = [question.prompt for question in questions]
        answers = answering.answer_greedily(self.target, self.tokenizer, prompts, batch=256)
        own = [Question(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        rows = samples.single_turns(self.tokenizer, own)
        tokens, labels = (torch.from_numpy(part).long().to(self.device) for part in rows)
        chosen = labels != samples.IGNORED

        @torch.no_grad()
        def measure() -> float:
            logits = self.draft(input_ids=tokens).logits[:, :-1][chosen[:, 1:]]
            return (logits.argmax(-1) == labels[chosen]).float().mean().item()

        return measure

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
