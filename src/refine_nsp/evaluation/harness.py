"""Give lm-eval a model that runs all its tasks: `lm_eval --model refine-nsp`. Padding in a batch changes no result.

`python -m refine_nsp.evaluation.harness ARGS` is `lm_eval ARGS` with this model registered; `refine-nsp evaluate --tasks lm_eval:NAME` runs
single tasks together with others. Settings mean what they mean to lm-eval's own `HFLM`, with these differences: states make prompts of any
length fit, so nothing is truncated unless `max_length` says so; a prompt has one BOS and no EOS whatever the tokenizer and the template
add; a sampled answer does not depend on the batch that it is in; an argument that has no meaning here is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import jinja2
import torch
from accelerate.utils import gather
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from refine_nsp.errors import RefineError, first_line
from refine_nsp.evaluation.documents import score_document
from refine_nsp.evaluation.harness_settings import (
    Settings,
    logger,
    place,
    read_settings,
    refuse,
    stop_check,
    with_bos,
)
from refine_nsp.evaluation.likelihood import log_likelihoods
from refine_nsp.models.generation import Decoding, Request, answer_all, end_tokens
from refine_nsp.models.load import check_vocabulary, load_model, load_tokenizer
from refine_nsp.models.protocols import CausalModel
from refine_nsp.processes import process_state, to_device
from refine_nsp.prompts.encoding import Pair, encode_pair, encode_prompt, encode_text, start_token
from refine_nsp.prompts.examples import in_row

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import postprocess_generated_text
    from lm_eval.models.utils_hf import stop_sequences_criteria
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, warning_once
except ImportError as missing:
    raise RefineError("tasks of lm-eval need lm-eval 0.4.12 or newer: pip install -U 'refine-nsp[eval]' lm-eval") from missing


T = TypeVar("T")
# The texts of a pair, the tokens of its context, and those of its continuation.
Scored = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("refine-nsp")
class HarnessModel(TemplateLM):
    """lm-eval's interface to a fast-weight model, or any model that `load` takes.

    Args:
        pretrained: a shipped name, folder or hub name; or give `model` and `tokenizer`.
        tokenizer: a tokenizer, or the name of another than the model's.
        batch_tokens: tokens per batch, which bounds the memory (lm-eval's own batch_size is not used).
        max_length: keep only so many tokens of a prompt's end (and answer), as HFLM does; None: all.
        dtype: the type of the weights; None and `auto`: the one that the model's configuration names.
        device: where to run; one that this machine does not have is replaced, with a warning. None: CUDA where there is one, else the
            CPU (a given `model` stays where it is). Under `accelerate launch`, each process has its own.
        add_bos_token: whether texts begin with BOS; None: as the tokenizer has it.
        prefix_token_id: the token before an empty context, and before a text whose perplexity is measured; None: BOS, else EOS.
        think_end_token: an answer begins after the last such token (text or id).
        enable_thinking, chat_template_args: what the chat template is given.
        batch_size, max_batch_size: lm-eval always gives these; they are not used.

    Raises:
        RefineError: an argument is unknown, or is HFLM's and has no meaning here.
    """

    def __init__(
        self, pretrained: str | None = None, model: CausalModel | None = None,
        tokenizer: PreTrainedTokenizerBase | str | None = None, batch_tokens: int = 16384, max_length: int | None = None,
        dtype: torch.dtype | str | None = None, device: torch.device | str | None = None, add_bos_token: bool | None = None,
        prefix_token_id: int | None = None, think_end_token: str | int | None = None, enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None, batch_size: int | str | None = None, max_batch_size: int | None = None,
        **others: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        refuse(others, HarnessModel.__init__.__annotations__)
        if (pretrained is None) == (model is None):
            raise RefineError("give either pretrained, or model and tokenizer")
        if enable_thinking and think_end_token is None:
            raise RefineError("enable_thinking=True needs think_end_token, after which the answer begins, such as '</think>'")
        if max_length is not None and int(max_length) < 1:
            raise RefineError(f"max_length must be at least 1 token, got {max_length}")
        if pretrained is not None:
            model, tokenizer = _load(pretrained, tokenizer, dtype)
            state = process_state()
            self._rank, self._world_size = state.process_index, state.num_processes
        if model is None or not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise RefineError("give the tokenizer beside the model")
        if pretrained is not None or device is not None:
            model = to_device(model, place(device))
        self.model = model.eval()
        self.tokenizer = tokenizer if add_bos_token is None else with_bos(tokenizer, add_bos_token)
        self.batch_tokens, self.max_length = int(batch_tokens), None if max_length is None else int(max_length)
        self.custom_prefix_token_id = prefix_token_id
        as_id = isinstance(think_end_token, str) and think_end_token.isdigit()
        self.think_end_token = int(str(think_end_token)) if as_id else think_end_token
        self.enable_thinking = enable_thinking
        self.chat_template_args = dict(chat_template_args or {})
        if enable_thinking is not None:
            self.chat_template_args["enable_thinking"] = enable_thinking
        self._eos = end_tokens(model, self.tokenizer)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id  # None for some

    @property
    def prefix_token_id(self) -> int:
        return start_token(self.tokenizer) if self.custom_prefix_token_id is None else int(self.custom_prefix_token_id)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: object
    ) -> list[int]:
        """Encode a text without special tokens if told so, else as a prompt (one BOS, no EOS); keep the last `left_truncate_len` tokens."""
        ids = encode_text(self.tokenizer, string) if add_special_tokens is False else encode_prompt(self.tokenizer, string)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        """Decode tokens to text."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

    def _encode_pair(self, context: str, continuation: str) -> Pair:
        before, ids = encode_pair(self.tokenizer, context, continuation)
        if self.custom_prefix_token_id is None or context.strip():
            return before, ids
        whole, before = encode_text(self.tokenizer, context + continuation), [self.prefix_token_id]
        ids = whole[1:] if whole[:1] == before else whole
        if not ids:
            raise RefineError(f"the continuation {continuation[:60]!r} has no token; expected some text")
        return before, ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write a conversation as text by the tokenizer's template; without the generation prompt the last message is left open."""
        how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **(how | self.chat_template_args)))
        except (jinja2.TemplateError, ValueError) as error:
            without = [m for m in chat_history if m["role"] != "system"]
            if without == chat_history or not isinstance(error, jinja2.TemplateError):
                raise RefineError(f"the tokenizer's chat template does not take these messages: {first_line(error)}") from error
        warning_once(logger, "the chat template does not take these messages: the system's are left out")
        return self.apply_chat_template(without, add_generation_prompt)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-probability of the continuation of each pair of texts, and whether it is the greedy one."""
        if self.enable_thinking:
            raise RefineError("enable_thinking=True is for tasks that generate; these score given continuations")
        pairs = []
        for request in requests:
            with _naming(request):
                context, continuation = self._encode_pair(*request.args)
                pairs.append((request.args, self._cut(context, len(continuation) - 1), continuation))
        return self._loglikelihood_tokens(pairs)

    def _loglikelihood_tokens(
        self, requests: list[Scored], disable_tqdm: bool = False, **kwargs: object
    ) -> list[tuple[float, bool]]:
        answers = log_likelihoods(self.model, [(context, ids) for _, context, ids in requests], self.batch_tokens)
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _cut(self, ids: list[int], others: int) -> list[int]:
        """Keep the last tokens that leave room for `others` more that the model reads (all of a continuation but its last token)."""
        if self.max_length is None or len(ids) + others <= self.max_length:
            return ids
        if (room := self.max_length - others) < 1:
            raise RefineError(f"max_length={self.max_length} leaves no room for a context before {others} tokens; raise it")
        warning_once(logger, f"contexts are cut from the left to fit max_length={self.max_length}")
        return ids[-room:]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text after the prefix token.

        The state is carried through the text; with `max_length` it is read in windows of so many tokens, as HFLM does. The tokenizer
        adds nothing, so that BOS is not itself predicted.
        """
        log_p = []
        for request in requests:
            ids = encode_text(self.tokenizer, request.args[0])
            log_p.append(self._rolling(ids) if ids else 0.0)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, log_p[-1])
        return log_p

    def _rolling(self, ids: list[int]) -> float:
        if self.max_length is None:
            score = score_document(self.model, [self.prefix_token_id, *ids], None, len(ids) + 1)
            return -score.figures["loss"] * score.targets
        windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
        pairs = [make_disjoint_window(window) for window in windows]
        return sum(x for x, _ in log_likelihoods(self.model, pairs, self.batch_tokens))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate an answer to each request by its own settings, up to a stop string or to the end of its budget."""
        asked, prompts, eos = [], [], self.tokenizer.eos_token_id
        eos_text = None if eos is None else self.tok_decode([eos], skip_special_tokens=False)
        seed = int(torch.randint(2**31, ()))  # lm-eval seeds torch's own generator
        for request in requests:
            with _naming(request):
                settings = read_settings(request.args[1], self.model.generation_config, eos_text, seed)
                ids = self._cut(self.tok_encode(request.args[0]) or [self.prefix_token_id], settings.budget)
                asked.append(settings.for_prompt(len(ids)))
                prompts.append(ids)
        answers = [""] * len(requests)
        for i, tokens in self._answers(requests, asked, prompts):
            answers[i] = self._text(tokens, asked[i].until)
            self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
        return answers

    def _answers(
        self, requests: list[Instance], asked: list[Settings], prompts: list[list[int]]
    ) -> Iterator[tuple[int, list[int]]]:
        by_decoding: dict[Decoding, list[Request]] = {}
        for i, (settings, ids) in enumerate(zip(asked, prompts, strict=True)):
            if settings.decoding is not None:
                stop = stop_check(self.tokenizer, settings.until)
                by_decoding.setdefault(settings.decoding, []).append(Request(i, ids, settings.budget, stop))
            else:
                with _naming(requests[i]):
                    yield i, self._by_transformers(ids, settings)
        for decoding, members in by_decoding.items():
            for batch in answer_all(self.model, members, self._eos, decoding, self.batch_tokens):
                for request, tokens in batch:
                    yield request.key, tokens

    @torch.no_grad()
    def _by_transformers(self, ids: list[int], settings: Settings) -> list[int]:
        """Generate an answer by transformers' `generate`, which knows beams, penalties and all other settings."""
        prompt = torch.tensor([ids], device=self.model.device)
        stop = stop_sequences_criteria(self.tokenizer, settings.until, len(ids), 1)  # type: ignore[arg-type]
        pad = next((t for t in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if t is not None), 0)
        try:
            found = self.model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=settings.budget, pad_token_id=pad,
                stopping_criteria=stop, **settings.options,
            )  # fmt: skip
        except (ValueError, TypeError) as error:
            raise RefineError(f"transformers' generate refuses the settings {settings.options}: {first_line(error)}") from error
        return found[0, len(ids) :].tolist()

    def _text(self, tokens: list[int], until: list[str]) -> str:
        """Decode an answer: the text behind the model's thoughts, up to a stop string."""
        end = self.think_end_token
        if not isinstance(end, int):
            return postprocess_generated_text(self.tok_decode(tokens), until, end)
        if end in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(end) :]
        return postprocess_generated_text(self.tok_decode(tokens).lstrip(), until, None)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the tensors of all processes."""
        return gather(tensor) if self.world_size > 1 else tensor  # type: ignore[no-any-return]

    def gather_object(self, obj: T, dst: int = 0) -> list[T] | None:
        """Collect the objects of all processes on process `dst`; return None on the others."""
        if self.world_size == 1:
            return [obj]
        found = [obj] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, found, dst)
        return found

    def barrier(self) -> None:
        """Wait for all processes."""
        process_state().wait_for_everyone()


def _load(
    pretrained: str, tokenizer: PreTrainedTokenizerBase | str | None, dtype: torch.dtype | str | None
) -> tuple[CausalModel, PreTrainedTokenizerBase]:
    if not isinstance(pretrained, str):
        raise RefineError(f"pretrained is a {type(pretrained).__name__}; give a loaded model as model, with its tokenizer")
    model = load_model(pretrained, dtype)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = load_tokenizer(tokenizer or pretrained)
    check_vocabulary(model, tokenizer)
    return model, tokenizer


def _naming(request: Instance) -> AbstractContextManager[None]:
    """Add the task and the document to a RefineError that is raised inside."""
    return in_row(f"{request.task_name}, document {request.doc_id}" if request.task_name else f"request {request.idx}")


def run_harness(
    model: CausalModel, tokenizer: PreTrainedTokenizerBase, name: str, limit: int, batch_tokens: int, seed: int
) -> dict[str, Any]:
    """Run one task of lm-eval and return its results. Raises RefineError when it cannot be loaded (offline, unknown name)."""
    wrapped = HarnessModel(model=model, tokenizer=tokenizer, batch_tokens=batch_tokens)
    try:
        results = simple_evaluate(
            wrapped, tasks=[name], limit=limit or None, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
            log_samples=True, bootstrap_iters=1000,
        )  # fmt: skip
    except Exception as error:  # lm-eval raises many kinds: the network, missing names, data sets
        raise RefineError(f"lm-eval could not run {name!r}: {first_line(error)}") from error
    return dict(results)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except RefineError as error:
        sys.exit(f"refine-nsp: {error}")
