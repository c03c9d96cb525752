"""From prompts and answers to tokens: where one ends and the other begins, and cutting what is too long."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from refine_nsp.errors import RefineError

Pair = tuple[list[int], list[int]]  # context ids (at least one), continuation ids (at least one)


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> Pair:
    """Tokens of the context, and those that `context + continuation` adds, trailing spaces of the context moved over (as in lm-eval)."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    if not context:
        return [start_token(tokenizer)], tokenizer(continuation, add_special_tokens=False)["input_ids"]
    before, both = tokenizer(context)["input_ids"], tokenizer(context + continuation)["input_ids"]
    return before, both[len(before) :]


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands before an empty context: BOS, or EOS. RefineError when the tokenizer has neither."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise RefineError("the tokenizer has neither BOS nor EOS, so nothing can stand before an empty context")


def truncate_middle(ids: Sequence[int], limit: int, tail: int = 0) -> list[int]:
    """At most `limit` tokens: the first half and the last, as LongBench cuts prompts; the end keeps at least `tail` tokens.

    Raises:
        RefineError: `tail` alone is longer.
    """
    if len(ids) <= limit:
        return list(ids)
    if limit < 2 or tail > limit:
        raise RefineError(f"a prompt of {len(ids)} tokens cannot be cut to {limit}: its end alone, which is kept, has {tail}")
    end = max(limit // 2, tail)
    return [*ids[: limit - end], *ids[len(ids) - end :]]
