"""What a model answers, decoded greedily with transformers."""

from collections.abc import Sequence

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.demo_models.questions import Question
from scripts.demo_models.samples import IGNORED, single_turns

MAX_NEW_TOKENS = 96
VERIFIED_AT_ONCE = 128


def chat_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """Render one user turn, ready for the assistant's answer."""
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return text


@torch.no_grad()
def answer_greedily(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], batch: int
) -> list[str]:
    """Return the model's greedy answers, `batch` prompts at a time."""
    tokenizer.padding_side = "left"
    answers: list[str] = []
    for begin in range(0, len(prompts), batch):
        texts = [chat_prompt(tokenizer, prompt) for prompt in prompts[begin : begin + batch]]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16):
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        answers += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


@torch.no_grad()
def own_answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question]
) -> list[str]:
    """Return the model's greedy answers, decoding only those that one verifying pass shows to differ.

    Where every token of a given answer is the model's choice after the tokens before it, that answer is its greedy one.
    """
    rows = single_turns(tokenizer, questions)
    agreed: list[bool] = []
    for begin in range(0, len(questions), VERIFIED_AT_ONCE):
        tokens, labels = (torch.from_numpy(part[begin : begin + VERIFIED_AT_ONCE]).long() for part in rows)
        hidden = model.model(input_ids=tokens.to(model.device)).last_hidden_state[:, :-1]
        wanted = labels[:, 1:].to(model.device)
        for row in range(len(tokens)):
            answer = wanted[row] != IGNORED
            agreed.append(bool((model.lm_head(hidden[row, answer]).argmax(-1) == wanted[row, answer]).all()))
    others = [question.prompt for question, same in zip(questions, agreed, strict=True) if not same]
    decoded = iter(answer_greedily(model, tokenizer, others, batch=32))
    return [question.answer if same else next(decoded) for question, same in zip(questions, agreed, strict=True)]
