"""Triton adapter of the backend "speculative_decoding": a cached answer is sent on at once, any other is decoded."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

sys.path.append(str(Path(__file__).parents[1]))  # Triton adds this file's folder only

from speculative_decoding.answer_store import AnswerStore
from speculative_decoding.drafter import ModelDrafter
from speculative_decoding.engine import Engine
from speculative_decoding.execution_provider import Provider, execution_provider
from speculative_decoding.language_model import LanguageModel
from speculative_decoding.metrics import Metrics
from speculative_decoding.options import GenerationOptions
from speculative_decoding.reply import TritonReply, decode_answers
from speculative_decoding.request import GenerationRequest
from speculative_decoding.responder import Responder
from speculative_decoding.row_independence import rows_are_independent
from speculative_decoding.scheduler import QueueFullError
from speculative_decoding.sequence import Sequence
from speculative_decoding.settings import Settings
from speculative_decoding.tokenizer import Tokenizer
from speculative_decoding.triton_tensors import FINAL, respond, send_error
from speculative_decoding.validation import InvalidOptionError, refuse
from speculative_decoding.vocabulary import require_draft_fits, require_same_vocabulary
from speculative_decoding.warm_up import measure_costs

NOT_INDEPENDENT = (
    "{model}: a token's logits depend on what is fed with it, so that speculation could change answers: requests with "
    'acceptance "exact" are decoded without it. Export the target with --precision row-int8 or fp32.'
)


class TritonPythonModel:
    """A target, an optional draft, and the engine that decodes with them."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load <model>/<version>/target and, where it exists, .../draft; an exception here is Triton's load error."""
        self._settings = Settings.from_config(json.loads(args["model_config"]))
        folder = Path(args["model_repository"], args["model_version"])
        provider = execution_provider(args["model_instance_kind"], int(args["model_instance_device_id"]))
        self._tokenizer = Tokenizer(folder / "target", self._settings.prompt_format)
        slots = self._settings.max_sequences
        target = LanguageModel(folder / "target", slots, self._settings.threads, spinning=True, provider=provider)
        draft = self._load_draft(folder / "draft", target, provider)
        self._has_draft = draft is not None
        self._vocabulary = target.shape.vocabulary
        self._is_exact = rows_are_independent(target)
        if not self._is_exact:
            pb_utils.Logger.log_warn(NOT_INDEPENDENT.format(model=args["model_name"]))
        longest, kv_bytes = self._settings.speculation_length, self._settings.kv_bytes
        drafter = ModelDrafter(draft, loops={longest // 2, longest} - {0, 1}) if draft else None
        self._engine = Engine(
            target,
            drafter,
            longest,
            self._settings.max_waiting,
            measure_costs(target, drafter, longest),
            kv_bytes // target.bytes_per_token if kv_bytes else None,
        )
        self._responder = Responder(self._tokenizer, self._engine.cancel)
        self._store = AnswerStore(self._settings.cache_model)
        self._metrics = Metrics(args["model_name"], self._engine, target.bytes_per_token, self._is_exact)

    def execute(self, requests: list[Any]) -> None:
        """Start an answer to each request; responses follow from other threads."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._start(request, sender)
            except InvalidOptionError as error:
                send_error(sender, str(error), pb_utils.TritonError.INVALID_ARG)
            except QueueFullError as error:
                send_error(sender, str(error), pb_utils.TritonError.UNAVAILABLE)

    def finalize(self) -> None:
        """Cancel what runs and end the threads."""
        self._engine.stop()
        self._responder.close()
        self._store.close()
        self._metrics.close()
        del self._metrics  # a metric that outlives finalize crashes the process on its way out

    def _load_draft(self, folder: Path, target: LanguageModel, provider: Provider) -> LanguageModel | None:
        if not folder.is_dir():
            return None
        require_same_vocabulary(self._tokenizer, Tokenizer(folder, "raw"))
        # One thread, the engine's own: more would fight with the target's for the same cores.
        draft = LanguageModel(folder, self._settings.max_sequences, threads=1, spinning=False, provider=provider)
        require_draft_fits(target.shape, draft.shape)
        return draft

    def _start(self, raw: Any, sender: Any) -> None:
        request = GenerationRequest.read(raw, self._settings, self._vocabulary)
        options = self._feasible(request.options)
        cached = request.cached
        if cached.answer:
            info = json.dumps({"acceptance_rate": None, **cached.info})
            respond(sender, decode_answers(cached.answer, options.n), info, {}, FINAL)
            return
        prompt = request.encode(self._tokenizer, self._engine.context_length)
        reply = TritonReply(sender, request, self._tokenizer, self._store, self._metrics)
        ends = self._engine.end_tokens
        sequences = [
            Sequence(prompt, options.for_answer(index), self._responder.emit, ends, index) for index in range(options.n)
        ]
        self._require_memory(sequences[0])
        for sequence in sequences:
            self._responder.open(sequence, reply)
        try:
            self._engine.submit(*sequences)
        except QueueFullError:
            for sequence in sequences:
                self._responder.discard(sequence)
            raise

    def _feasible(self, options: GenerationOptions) -> GenerationOptions:
        """Return what this model can do of `options`. Raises InvalidOptionError."""
        if options.drafter == "model" and not self._has_draft:
            raise refuse("drafter", "model", "auto, prompt_lookup or none: this model has no draft")
        if options.acceptance == "exact" and not self._is_exact:
            return replace(options, drafter="none")
        return options

    def _require_memory(self, sequence: Sequence) -> None:
        most, budget = self._engine.most_tokens(sequence), self._engine.kv_tokens
        if budget is not None and most > budget:
            raise refuse(
                "max_tokens", sequence.options.max_tokens, f"less: prompt and answer may have {budget} tokens together"
            )
