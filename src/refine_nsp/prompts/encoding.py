"""Make tokens of prompts, contexts, answers and continuations: training, test time, generation and evaluation all do it here.

A prompt begins exactly once with what the tokenizer puts before a text (BOS, where it has one), whether the tokenizer or a chat template
writes it. Nothing follows a prompt: the EOS or separator that some tokenizers append would end it before its answer. An answer is whole and
ends with exactly one EOS. Documents are not prompts: they keep all special tokens of their tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from refine_nsp.errors import RefineError, first_line

Pair = tuple[list[int], list[int]]  # context ids (at least one), continuation ids (at least one)
Message = Mapping[str, object]  # role, content (text, or parts that are text), and whatever else a template may read
Messages = Sequence[Message]
Prompt = str | Messages

PROBE = "a"  # a text that is encoded only to see which tokens appear around it
PLACEHOLDER = "<answer>"  # it takes the answer's place in a conversation, to see what the template writes around an answer
ROLES = {"human": "user", "gpt": "assistant"}  # the roles of ShareGPT's conversations


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode a text alone, without special tokens around it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text: BOS for most, [CLS] for some, often none."""
    whole, plain = list(tokenizer(PROBE)["input_ids"]), encode_text(tokenizer, PROBE)
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return whole[:at]
    raise RefineError(f"the tokenizer makes {whole} of {PROBE!r} with special tokens and {plain} without: which come first?")


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, **template: object) -> list[int]:
    """Encode what a model is to continue: a text, or a conversation by the tokenizer's chat template.

    Args:
        prompt: a text as it is, which may have been written by a chat template already; or messages (see `render`).
        template: what the chat template is given in addition (`tools`, `enable_thinking`, ...).

    Raises:
        RefineError: messages that are none, or that the template refuses; a tokenizer without a template.
    """
    text = prompt if isinstance(prompt, str) else render(tokenizer, prompt, **template)
    ids, leading = encode_text(tokenizer, text), leading_tokens(tokenizer)
    return ids if ids[: len(leading)] == leading else [*leading, *ids]


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> Pair:
    """Encode a context, and the tokens that `context + continuation` adds to it. Trailing spaces move to the continuation, as in lm-eval.

    A continuation that merges into the context's last token would have no token of its own, so it is encoded by itself. One without any
    token is a RefineError, and so is an empty context where the tokenizer has neither BOS nor EOS.
    """
    if (spaces := len(context) - len(context.rstrip())) > 0:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    before, ids = encode_prompt(tokenizer, context) if context else [], encode_text(tokenizer, continuation)
    if not before:
        before = [start_token(tokenizer)]
        ids = ids[1:] if ids[:1] == before else ids  # a continuation may bring the start token along
    else:
        ids = encode_prompt(tokenizer, context + continuation)[len(before) :] or ids
    if not ids:
        raise RefineError(f"the continuation {continuation[:60]!r} has no token; expected some text")
    return before, ids


def encode_answer(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: str | Message, **template: object) -> Pair:
    """Encode a prompt as `encode_prompt` does, and the whole answer behind it, with exactly one EOS at its end.

    White space at the prompt's end that merges with the answer belongs to the answer. Behind a conversation, the answer is the assistant's
    turn with what the chat template writes around it: the end of a turn, then EOS if that is another token.

    Args:
        answer: a text exactly as it follows the prompt's text, or the assistant's message behind messages.
        template: see `encode_prompt`.

    Raises:
        RefineError: no EOS, an answer without any token, or what `encode_prompt` refuses.
    """
    if (eos := tokenizer.eos_token_id) is None:
        raise RefineError("the tokenizer has no EOS token, so where an answer ends cannot be said; set tokenizer.eos_token")
    text = prompt if isinstance(prompt, str) else render(tokenizer, prompt, **template)
    if not isinstance(prompt, str):
        answer = _turn(tokenizer, text, prompt, answer, template)
    elif not isinstance(answer, str):
        raise RefineError("the answer is a message and the prompt a text; expected messages for both, or text for both")
    prompt_ids, ids = _behind(tokenizer, text, answer)
    while ids and ids[-1] == eos:
        ids = ids[:-1]
    if not ids:
        raise RefineError(f"the answer {answer[:60]!r} has no token; expected some text")
    return prompt_ids, [*ids, int(eos)]


def _behind(tokenizer: PreTrainedTokenizerBase, text: str, answer: str) -> Pair:
    """Encode a text and the answer that follows it. An answer that merges with more than white space is encoded by itself."""
    before, both = encode_prompt(tokenizer, text), encode_prompt(tokenizer, text + answer)
    if both[: len(before)] != before and text != text.rstrip():
        bare = encode_prompt(tokenizer, text.rstrip())
        if both[: len(bare)] == bare:
            shared = next((i for i, (a, b) in enumerate(zip(before, both, strict=False)) if a != b), len(both))
            return both[:shared], both[shared:]
    if both[: len(before)] == before and len(both) > len(before):
        return before, both[len(before) :]
    return before, encode_text(tokenizer, answer)


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Choose the token before an empty context: BOS, EOS, or what the tokenizer begins texts with. RefineError: it has none of them."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, *leading_tokens(tokenizer)):
        if token is not None:
            return int(token)
    raise RefineError("the tokenizer has neither BOS nor EOS, so nothing can stand before an empty context")


def as_messages(value: object) -> list[dict[str, object]]:
    """Convert a conversation to what chat templates take: content as text, and no key without a value (files' columns fill in None).

    Messages have `role` and `content`, or ShareGPT's `from` and `value`. Content may be a list of parts, if all are text; a RefineError
    names a message that is anything else.
    """
    if not isinstance(value, list | tuple) or not value:
        raise RefineError(f"expected a list of messages, got {_shown(value)}")
    return [_message(message, i) for i, message in enumerate(value)]


def _message(message: object, place: int) -> dict[str, object]:
    if not isinstance(message, Mapping):
        raise RefineError(f"message {place} is {_shown(message)}; expected a mapping of role and content")
    known = _filled(message)
    role = known.pop("role", None) or ROLES.get(str(message.get("from")), known.get("from"))
    content = known.pop("content", None) if "content" in known else known.pop("value", None)
    known.pop("from", None)
    if not isinstance(role, str) or not role:
        raise RefineError(f"message {place} has no role; it has {', '.join(map(str, message)) or 'nothing'}")
    if content is None and "tool_calls" in known:
        return {"role": role, **known}
    return {"role": role, "content": _content(content, place), **known}


def _content(content: object, place: int) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise RefineError(f"the content of message {place} is {_shown(content)}; expected text")
    for part in content:
        known = part if isinstance(part, Mapping) else {}
        if known.get("type", "text") != "text" or not isinstance(known.get("text"), str):
            kind = known.get("type") or _shown(part)
            raise RefineError(f"the content of message {place} has a part that is {kind}; expected text only")
    return "".join(part["text"] for part in content)


def _filled(value: Any) -> Any:
    """Drop keys that hold None: a file's columns give them to every row when one row has them."""
    if isinstance(value, Mapping):
        return {key: _filled(v) for key, v in value.items() if v is not None}
    return [_filled(v) for v in value] if isinstance(value, list | tuple) else value


def _shown(value: object) -> str:
    return f"{value!r:.60} ({type(value).__name__})"


def render(tokenizer: PreTrainedTokenizerBase, messages: object, **template: object) -> str:
    """Write a conversation as text by the tokenizer's chat template.

    After a user's turn the assistant's turn is begun. An assistant's turn at the end is left open, to be continued, as TRL and lm-eval do.

    Raises:
        RefineError: there is no template, these are no messages, or the template refuses them.
    """
    known = as_messages(messages)
    if not tokenizer.chat_template:
        raise RefineError("these are messages, and the tokenizer has no chat template; set tokenizer.chat_template, or use text")
    left_open = known[-1]["role"] == "assistant"
    return _apply(tokenizer, known, template, add_generation_prompt=not left_open, continue_final_message=left_open)


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, object]], template: Mapping[str, object], **how: bool
) -> str:
    options: dict[str, Any] = {**_filled(template), "conversation": messages, **how}
    try:
        if isinstance(tools := options.get("tools"), str):  # TRL also takes tools as JSON in a column
            options["tools"] = json.loads(tools)
        return str(tokenizer.apply_chat_template(tokenize=False, **options))
    except Exception as error:  # a template's code may raise anything, besides jinja's own kinds
        raise RefineError(f"the tokenizer's chat template does not take these messages: {first_line(error)}") from error


def _turn(
    tokenizer: PreTrainedTokenizerBase, text: str, prompt: Messages, answer: str | Message, template: Mapping[str, object]
) -> str:
    """Write what follows the text of a prompt: the answer, and what the template writes around it in the assistant's turn."""
    known = as_messages(prompt)
    message = {"role": "assistant", "content": answer} if isinstance(answer, str) else as_messages([answer])[0]
    words = str(message.get("content", ""))
    if not words.strip():
        raise RefineError("the assistant's turn has no text; expected an answer")
    begun = str(known.pop()["content"]) if known[-1]["role"] == "assistant" else ""
    turns = [[*known, {**message, "content": begun + content}] for content in (PLACEHOLDER, words)]
    around, whole = (_apply(tokenizer, turn, template) for turn in turns)
    head, found, end = around.partition(PLACEHOLDER)
    written = whole[len(head) : len(whole) - len(end)] if whole.startswith(head) and whole.endswith(end) else ""
    if not found or words.strip() not in written:
        return words
    lead = head[len(text) :] if head.startswith(text) else ""
    return f"{lead}{written}{end.rstrip()}"


def truncate_middle(ids: Sequence[int], limit: int, tail: int = 0) -> list[int]:
    """Cut a prompt to `limit` tokens by taking out its middle, as LongBench does; the end keeps at least `tail` (no more than `limit`)."""
    if len(ids) <= limit:
        return list(ids)
    if limit < 2 or tail > limit:
        raise RefineError(f"a prompt of {len(ids)} tokens cannot be cut to {limit}: its end alone, which is kept, has {tail}")
    end = max(limit // 2, tail)
    return [*ids[: limit - end], *ids[len(ids) - end :]]


def content_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest what a tokenizer does, as the key by which its tokens are cached. (A pickled tokenizer differs once it has been used.)"""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # tokenizers written in Python have none
    if backend is None:
        files: object = [sorted(tokenizer.get_vocab().items()), sorted(map(str, tokenizer.init_kwargs.items()))]
    else:
        files = backend.to_str()
    ends = tokenizer.bos_token_id, tokenizer.eos_token_id
    parts = [type(tokenizer).__name__, files, tokenizer(PROBE)["input_ids"], *ends, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
