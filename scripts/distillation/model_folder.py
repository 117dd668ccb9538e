"""Hugging Face folders: reading teachers and students, and writing what was made."""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tokenizers
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from scripts.distillation.errors import DistillationError

Kind = Literal["encoder", "language model"]
LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
UNUSED = ("pooler.", "position_ids")  # of encoders: what mean pooling does not read
# What belongs to a tokenizer, or says how sentence vectors are made.
COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt",
    "tokenizer.model", "added_tokens.json", "chat_template.jinja", "modules.json", "sentence_bert_config.json",
    "config_sentence_transformers.json", "1_Pooling", "2_Normalize",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class ModelFolder:
    """A model in fp32 with its tokenizer, which neither pads nor truncates."""

    folder: Path
    kind: Kind
    model: PreTrainedModel
    tokenizer: tokenizers.Tokenizer

    @property
    def context(self) -> int:
        """The most tokens that a text can have."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or 1 << 30)


def open_folder(folder: Path) -> ModelFolder:
    """Load the encoder or causal language model in `folder`. Raises DistillationError."""
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise DistillationError(f"{folder} has no {name}: it must be a local Hugging Face folder")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        kind = _kind(config)
        loader = AutoModel if kind == "encoder" else AutoModelForCausalLM
        model, loaded = loader.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except LOAD_ERRORS as error:
        raise DistillationError(f"{folder} does not load: {_first_line(error)}") from error
    except Exception as error:  # tokenizers raises the bare class
        raise DistillationError(f"{folder}/tokenizer.json does not load: {_first_line(error)}") from error
    missing = [name for name in loaded["missing_keys"] if not name.startswith(UNUSED)]
    if missing:
        raise DistillationError(f"{folder} lacks weights of {len(missing)} tensors: {', '.join(sorted(missing)[:3])}")
    if kind == "encoder":
        _require_mean_pooling(folder)
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise DistillationError(
            f"{folder}: the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {config.vocab_size}"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return ModelFolder(folder, kind, model.eval(), tokenizer)


def _kind(config: PretrainedConfig) -> Kind:
    names = config.architectures or ["nothing"]
    if getattr(config, "is_encoder_decoder", False):
        raise DistillationError(f"{names[0]} is an encoder-decoder: only encoders and causal language models distil")
    return "language model" if names[0].endswith(("ForCausalLM", "LMHeadModel")) else "encoder"


def _require_mean_pooling(folder: Path) -> None:
    described = folder / "1_Pooling" / "config.json"
    if described.is_file() and not json.loads(described.read_text(encoding="utf-8")).get("pooling_mode_mean_tokens"):
        raise DistillationError(f"{described}: only mean pooling is served, and so distilled")


def require_same_vocabulary(teacher: ModelFolder, student: ModelFolder) -> None:
    """Raise DistillationError unless `student` can learn the teacher's tokens."""
    if student.kind != teacher.kind:
        raise DistillationError(
            f"they must be of one kind: {teacher.folder}: {teacher.kind}, {student.folder}: {student.kind}"
        )
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise DistillationError(f"{student.folder} has another tokenizer than {teacher.folder}: they must share one")
    sizes = [each.model.config.vocab_size for each in (teacher, student)]
    if teacher.kind == "language model" and sizes[0] != sizes[1]:
        raise DistillationError(f"the teacher has {sizes[0]} logits and the student {sizes[1]}: they must be equal")


def require_writable(output: Path) -> None:
    """Raise DistillationError unless a model can be put at `output`, in place of another or of nothing."""
    if output.exists() and not (output / "config.json").is_file() and (output.is_file() or any(output.iterdir())):
        raise DistillationError(f"{output} exists and is no model's folder: choose another --output")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent):
            pass
    except OSError as error:
        raise DistillationError(f"cannot write to {output.parent}: {error.strerror}") from error


def write(model: PreTrainedModel, teacher: ModelFolder, output: Path) -> None:
    """Put `model` with the teacher's tokenizer at `output`, whole or not at all, in place of what is there.

    A language model is stored in the teacher's type of number, an encoder in fp32.
    """
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".distil-") as scratch:
        made = Path(scratch) / "made"
        dtype = torch.float32 if teacher.kind == "encoder" else _stored_type(teacher.folder)
        model.to(dtype).save_pretrained(made)
        for name in COPIED:
            source = teacher.folder / name
            if source.is_dir():
                shutil.copytree(source, made / name)
            elif source.is_file():
                shutil.copy(source, made / name)
        if output.exists():
            output.rename(Path(scratch) / "replaced")
        made.rename(output)


def _stored_type(folder: Path) -> torch.dtype:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"), torch.float32)
    return named if isinstance(named, torch.dtype) else torch.float32


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
