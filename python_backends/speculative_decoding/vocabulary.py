"""Whether a draft speaks the target's language."""

from speculative_decoding.language_model import DecoderShape
from speculative_decoding.tokenizer import Tokenizer


def require_same_vocabulary(target: Tokenizer, draft: Tokenizer) -> None:
    """Raise ValueError, with the reason, unless every token has the same id in both."""
    ours, theirs = target.vocabulary(), draft.vocabulary()
    if ours == theirs:
        return
    different = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    token = different[0]
    raise ValueError(
        f"the draft's vocabulary differs from the target's in {len(different)} tokens, the first {token!r} "
        f"(target id {ours.get(token)}, draft id {theirs.get(token)}): use a draft made with the target's tokenizer"
    )


def require_draft_fits(target: DecoderShape, draft: DecoderShape) -> None:
    """Raise ValueError, with the reason, when a draft could propose what the target cannot take, or ends before it."""
    if draft.vocabulary > target.vocabulary:
        raise ValueError(
            f"the draft has {draft.vocabulary} logits, the target {target.vocabulary}: it may have no more"
        )
    if draft.context_length < target.context_length:
        raise ValueError(f"the draft's context is {draft.context_length} tokens, the target's {target.context_length}")
