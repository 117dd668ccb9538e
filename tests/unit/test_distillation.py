"""What a distillation is made of: order, losses, acceptance, initialisation, resuming."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from scripts.distillation import losses
from scripts.distillation.acceptance import rounds
from scripts.distillation.errors import DistillationError
from scripts.distillation.initialization import make_student
from scripts.distillation.model_folder import open_folder
from scripts.distillation.samples import Order, Sample, collate
from scripts.distillation.sampling import answer
from scripts.distillation.settings import Settings
from scripts.distillation.shape import Shape, picked_layers, student_shape
from scripts.distillation.trainer import Trainer
from tests import distillation, language_models

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # waking threads takes longer than such models do


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), rows=st.integers(1, 8), start=st.integers(0, 50))
@settings(max_examples=50, deadline=None)
def test_the_order_is_the_same_wherever_it_is_taken_up_and_an_epoch_has_every_sample(
    lengths: list[int], rows: int, start: int
) -> None:
    samples = [Sample([1] * length) for length in lengths]
    order = Order(samples, rows, 20, seed=3)
    steps = [order.at(step) for step in range(start + 20)]
    assert Order(samples, rows, 20, seed=3).at(start) == steps[start] == order.at(start)
    seen: list[int] = []
    for batch in steps:
        if len(seen) < len(samples):
            seen += batch
        assert len(batch) == 1 or (len(batch) <= rows and len(batch) * max(lengths[i] for i in batch) <= rows * 20)
    assert len(seen) < len(samples) or sorted(seen) == list(range(len(samples)))


def test_prompts_and_padding_are_not_learned() -> None:
    batch = collate([Sample([5, 6, 7, 8], 2), Sample([9, 10])], pad=0, device=CPU)
    assert batch.labels.tolist() == [[-100, -100, 7, 8], [9, 10, -100, -100]]
    assert batch.mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_equal_models_have_no_loss_and_the_divergence_is_kl() -> None:
    torch.manual_seed(0)
    own, wanted = torch.randn(5, 7), torch.randn(5, 7)
    assert losses.divergence(own, own, 2.0).item() == pytest.approx(0, abs=1e-6)
    p, q = wanted.softmax(-1), own.softmax(-1)
    assert losses.divergence(own, wanted, 1.0).item() == pytest.approx(
        (p * (p / q).log()).sum(-1).mean().item(), abs=1e-5
    )
    assert losses.direction(own, 3 * own).item() == pytest.approx(0, abs=1e-6)
    assert losses.pair_similarity(own, own @ torch.linalg.qr(torch.randn(7, 7))[0]).item() < 1e-3


@given(agreed=st.lists(st.booleans(), min_size=1, max_size=40), length=st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_rounds_are_those_of_drafting_and_verifying_token_by_token(agreed: list[bool], length: int) -> None:
    place = count = 0
    while place < len(agreed):
        for _ in range(length):  # drafted tokens, until one is refused
            if place >= len(agreed) or not agreed[place]:
                break
            place += 1
        place += 1  # the target's own token
        count += 1
    assert rounds(agreed, length) == count


def test_layers_are_picked_evenly_with_the_first_and_the_last() -> None:
    assert [picked_layers(6, 3), picked_layers(12, 4), picked_layers(6, 1), picked_layers(4, 4)] == [
        [0, 2, 5], [0, 4, 7, 11], [5], [0, 1, 2, 3],
    ]  # fmt: skip


def batches(count: int = 2) -> list:
    torch.manual_seed(1)
    return [collate([Sample(torch.randint(5, 200, (9,)).tolist()) for _ in range(4)], 0, CPU) for _ in range(count)]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "bert"])
def test_a_student_of_the_teachers_size_in_all_but_unused_units_computes_the_same(
    tmp_path: Path, architecture: str
) -> None:
    if architecture == "bert":
        distillation.save_encoder(tmp_path / "teacher", layers=2)
    else:
        language_models.save_random(tmp_path / "teacher", architecture, tied=False)  # type: ignore[arg-type]
    teacher = open_folder(tmp_path / "teacher")
    size = teacher.model.config.intermediate_size
    unused = torch.arange(0, size, 2)
    with torch.no_grad():
        for name, weight in teacher.model.named_parameters():
            if "gate_proj" in name or "intermediate.dense" in name:
                weight[unused] = 0
    shape = Shape(2, teacher.model.config.hidden_size, size // 2)
    student, kept = make_student(teacher, shape, batches())
    assert kept.layers == [0, 1]
    batch = batches(1)[0]
    with torch.no_grad():
        own, wanted = (
            model(input_ids=batch.tokens, attention_mask=batch.mask)[0] for model in (student, teacher.model)
        )
    assert torch.allclose(own, wanted, atol=2e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_narrower_student_keeps_whole_groups_of_heads(tmp_path: Path, architecture: str) -> None:
    language_models.save_random(tmp_path / "teacher", architecture, tied=True)  # type: ignore[arg-type]
    teacher = open_folder(tmp_path / "teacher")
    student, kept = make_student(teacher, student_shape(teacher.model.config, ratio=0.5, width=32), batches())
    config = student.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (
        1,
        32,
        2,
        1,
    )
    words, picked = student.get_input_embeddings().weight, teacher.model.get_input_embeddings().weight[:, kept.channels]
    assert torch.equal(words, picked)
    assert student(input_ids=batches(1)[0].tokens).logits.isfinite().all()


def test_greedy_answers_are_the_most_likely_tokens_in_any_batch(tmp_path: Path) -> None:
    model = language_models.save_random(tmp_path / "teacher", "llama", tied=True)
    prompts = [[7, 8, 9], [20, 21, 22, 23, 24], [30]]
    together = answer(model, prompts, 6, 0.0, seed=0, tokens_at_once=1000)
    assert [answer(model, [prompt], 6, 0.0, 1, 1000)[0] for prompt in prompts] == together
    for sample in together:
        logits = model(input_ids=torch.tensor([sample.tokens])).logits[0]
        assert logits[sample.given - 1 : -1].argmax(-1).tolist() == sample.tokens[sample.given :]


def test_sampled_answers_repeat_with_their_seed_and_differ_without(tmp_path: Path) -> None:
    model = language_models.save_random(tmp_path / "teacher", "llama", tied=True)
    drawn = [answer(model, [[7, 8, 9]] * 4, 6, 1.0, seed, 1000) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


class Line:
    """Fit a line; the held-out loss is taken from a list."""

    def __init__(self, held_out: list[float]) -> None:
        self._held_out = iter(held_out)

    def loss(self, student: nn.Module, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        given_ = torch.randn(8, 3, generator=generator)
        return (student(given_) - given_.sum(-1, keepdim=True)).square().mean()

    def held_out(self, student: nn.Module) -> dict[str, float]:
        return {"loss": next(self._held_out)}


def trainer(path: Path, task: Line, **values: int) -> Trainer:
    torch.manual_seed(0)
    return Trainer(nn.Linear(3, 1), task, Settings(**values), path, {"of": "this test"}, lambda line: None)  # type: ignore[arg-type]


def test_learning_stops_early_and_keeps_the_best_weights(tmp_path: Path) -> None:
    made = trainer(tmp_path / "a.pt", Line([3.0, 2.0, 1.0, 1.5, 1.4, 1.3, 1.2]), steps=100, evaluations=10, patience=3)
    reached = made.run()
    assert (reached.steps, reached.best, reached.best_step) == (50, 1.0, 20)
    short = trainer(tmp_path / "b.pt", Line([3.0, 2.0, 1.0]), steps=100, evaluations=10)
    short.run(stop_after=20)
    assert torch.equal(made._student.weight, short._student.weight)


def test_a_run_in_pieces_is_the_same_run(tmp_path: Path) -> None:
    values = [3.0 - 0.1 * index for index in range(11)]
    whole = trainer(tmp_path / "whole.pt", Line(values), steps=50, evaluations=10)
    curve = whole.run().curve
    for _ in range(0, 50, 7):
        part = trainer(tmp_path / "part.pt", Line([]), steps=50, evaluations=10)
        part._task = Line(values[len(part.progress.curve) :])
        part.run(stop_after=7)
    assert torch.equal(whole._student.weight, part._student.weight)
    assert [entry[:2] for entry in part.progress.curve[1:]] == [entry[:2] for entry in curve[1:]]


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"half")
    with pytest.raises(DistillationError, match=r"cannot be read.*--restart"):
        trainer(tmp_path / "a.pt", Line([]), steps=1)
