"""Triton adapter of the backend "speculative_decoding": a cached answer is sent on at once, any other is decoded."""

import gc
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

sys.path.append(str(Path(__file__).parents[1]))  # Triton adds this file's folder only

from speculative_decoding.answer_store import AnswerStore
from speculative_decoding.cuda_device import device_of
from speculative_decoding.decoder import Decoder, DecoderSettings, load_decoder, shares
from speculative_decoding.drafter import ModelDrafter
from speculative_decoding.engine import Engine
from speculative_decoding.execution_provider import Provider, execution_provider
from speculative_decoding.failures import errors_to
from speculative_decoding.flights import Flights
from speculative_decoding.metrics import Metrics
from speculative_decoding.options import GenerationOptions
from speculative_decoding.paged_independence import limit_tokens
from speculative_decoding.paged_model import PagedModel
from speculative_decoding.prefix_reuse import open_prefix_cache
from speculative_decoding.replay import pieces
from speculative_decoding.reply import TritonReply, decode_answers
from speculative_decoding.request import Cached, GenerationRequest
from speculative_decoding.responder import Reply, Responder
from speculative_decoding.row_independence import rows_are_independent
from speculative_decoding.scheduler import QueueFullError
from speculative_decoding.sequence import Sequence
from speculative_decoding.session_service import SessionService
from speculative_decoding.session_store import SessionStore
from speculative_decoding.session_turn import SessionTurn
from speculative_decoding.sessions import Sessions
from speculative_decoding.settings import Settings
from speculative_decoding.tokenizer import Tokenizer
from speculative_decoding.triton_tensors import FINAL, respond
from speculative_decoding.upkeep import Upkeep
from speculative_decoding.validation import refuse
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
        target, draft = self._load(folder, provider)
        self._has_draft = draft is not None
        self._vocabulary = target.shape.vocabulary
        self._is_exact = limit_tokens(target) if isinstance(target, PagedModel) else rows_are_independent(target)
        if not self._is_exact:
            pb_utils.Logger.log_warn(NOT_INDEPENDENT.format(model=args["model_name"]))
        reuse, name = self._settings.reuse, args["model_name"]
        kv_cache = open_prefix_cache(target, draft, reuse, name)
        longest, kv_bytes = self._settings.speculation_length, self._settings.kv_bytes
        drafter = ModelDrafter(draft, loops={longest // 2, longest} - {0, 1}) if draft else None
        self._engine = Engine(
            target,
            drafter,
            longest,
            self._settings.max_waiting,
            measure_costs(target, drafter, longest),
            kv_bytes // target.bytes_per_token if kv_bytes else None,
            kv_cache,
        )
        self._responder = Responder(self._tokenizer, self._engine.cancel)
        self._flights = Flights()
        self._session_store = SessionStore(reuse.session_store(name))
        sessions, limit = Sessions(self._session_store, kv_cache), self._engine.context_length
        waits = reuse.session_conflict == "wait"
        self._store = AnswerStore(self._settings.cache_model)
        self._metrics = Metrics(
            args["model_name"], self._engine, target.bytes_per_token, self._is_exact, kv_cache, sessions
        )
        self._sessions = SessionService(
            sessions, self._tokenizer, limit, waits, self._decode_turn, self._metrics.failed
        )
        self._upkeep = Upkeep(sessions, kv_cache, self._engine.is_idle, reuse.kv_integrity_check_s)

    def execute(self, requests: list[Any]) -> None:
        """Start an answer to each request; responses follow from other threads."""
        for request in requests:
            sender = request.get_response_sender()
            with errors_to(sender):
                self._start(request, sender)

    def finalize(self) -> None:
        """Cancel what runs and end the threads."""
        self._engine.stop()
        self._responder.close()
        self._sessions.close()
        self._upkeep.close()
        self._store.close()
        self._metrics.close()
        self._session_store.close()
        # Triton's metrics and senders crash the process when they are freed after this, by the interpreter's end.
        vars(self).clear()
        gc.collect()

    def _load(self, folder: Path, provider: Provider) -> tuple[Decoder, Decoder | None]:
        settings, free = self._settings, device_of(provider).free_bytes()
        folders = [path for path in (folder / "target", folder / "draft") if path.is_dir()]
        budget, tier = (0, 0) if free is None else settings.reuse.device_bytes(free)
        cached, tiers = shares(budget, folders), shares(tier, folders)
        slots = settings.max_sequences
        target = load_decoder(folders[0], DecoderSettings(slots, settings.threads, True, cached[0], tiers[0]), provider)
        if len(folders) == 1:
            return target, None
        require_same_vocabulary(self._tokenizer, Tokenizer(folders[1], "raw"))
        # One thread, the engine's own: more would fight with the target's for the same cores.
        draft = load_decoder(folders[1], DecoderSettings(slots, 1, False, cached[1], tiers[1]), provider)
        require_draft_fits(target.shape, draft.shape)
        return target, draft

    def _start(self, raw: Any, sender: Any) -> None:
        request = GenerationRequest.read(raw, self._settings, self._vocabulary)
        options = self._feasible(request.options)
        if request.cached.answer:
            _replay(sender, request.cached, options)
            return
        if request.session:
            self._sessions.serve(replace(request, options=options), sender)
            return
        prompt = request.encode(self._tokenizer, self._engine.context_length)
        reply = self._reply(request, sender)
        if flight := request.flight:
            # Of those who join, some may want a stream; how long each of them waits is known to its reply.
            shared = replace(options, stream=options.n == 1, timeout=0)
            decode = partial(self._decode, prompt, shared, request.arrived)
            self._flights.join(flight, reply, options.stream, options.n, decode, request.cached.asked)
        else:
            self._decode(prompt, options, request.arrived, reply)

    def _decode_turn(self, request: GenerationRequest, sender: Any, turn: SessionTurn) -> None:
        self._decode(turn.prompt, request.options, request.arrived, self._reply(request, sender, turn))

    def _reply(self, request: GenerationRequest, sender: Any, turn: SessionTurn | None = None) -> TritonReply:
        return TritonReply(sender, request, self._tokenizer, self._store, self._metrics, turn, self._sessions)

    def _decode(self, prompt: list[int], options: GenerationOptions, arrived: float, reply: Reply) -> None:
        """Have a prompt answered to `reply`. Raises InvalidOptionError and QueueFullError."""
        ends = self._engine.end_tokens
        sequences = [
            Sequence(prompt, options.for_answer(index), self._responder.emit, ends, index, arrived)
            for index in range(options.n)
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


def _replay(sender: Any, cached: Cached, options: GenerationOptions) -> None:
    """Send a cached answer as a decoded one would have been: piece by piece to who wants a stream."""
    answers = decode_answers(cached.answer, options.n)
    if options.stream:
        *others, answers[0] = pieces(answers[0])
        for piece in others:
            respond(sender, [piece], "", {})
    respond(sender, answers, json.dumps({"acceptance_rate": None, **cached.info}), {}, FINAL)
