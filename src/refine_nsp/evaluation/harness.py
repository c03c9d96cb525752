"""A model for lm-eval: `lm_eval --model refine-nsp` runs every task of it, batched exactly under padding.

`python -m refine_nsp.evaluation.harness ARGS` is `lm_eval ARGS` with this model registered; `refine-nsp evaluate --tasks lm_eval:NAME`
runs single tasks beside others. States make prompts of any length fit, so nothing is truncated unless `max_length` says so.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from refine_nsp.errors import RefineError, first_line
from refine_nsp.evaluation.documents import score_document
from refine_nsp.evaluation.likelihood import log_likelihoods
from refine_nsp.models.blocks import FastWeightForCausalLM
from refine_nsp.models.generation import Decoding, Request, answer_all, end_tokens
from refine_nsp.models.load import load
from refine_nsp.processes import to_device
from refine_nsp.prompts.encoding import encode_pair, start_token

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as missing:
    raise RefineError("tasks of lm-eval need it: pip install 'refine-nsp[eval]'") from missing

DEFAULT_NEW_TOKENS = 256


@register_model("refine-nsp")
class HarnessModel(TemplateLM):
    """lm-eval's interface to a fast-weight model.

    Args:
        pretrained: a shipped name, folder or hub name; or give `model` and `tokenizer`.
        batch_tokens: tokens per batch, which bounds the memory (lm-eval's own batch_size is not used).
        max_length: keep only so many tokens of a prompt's end; None: all.
    """

    def __init__(
        self, pretrained: str | None = None, model: FastWeightForCausalLM | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None, batch_tokens: int = 16384, max_length: int | None = None,
        dtype: str | None = None, device: str | None = None, **ignored: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if (pretrained is None) == (model is None):
            raise RefineError("give either pretrained, or model and tokenizer")
        if pretrained is not None:
            model, tokenizer = load(pretrained, dtype=dtype)
        if model is None or tokenizer is None:
            raise RefineError("give the tokenizer beside the model")
        if device is not None and device != "cpu":
            model = to_device(model, device)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.batch_tokens, self.max_length = int(batch_tokens), max_length
        self._eos = end_tokens(model, tokenizer)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        return start_token(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens unless told otherwise."""
        return self.tokenizer(string, add_special_tokens=add_special_tokens is not False)["input_ids"]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return encode_pair(self.tokenizer, context, continuation)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as one string, by the tokenizer's template."""
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt))

    def _cut(self, ids: list[int], room: int = 0) -> list[int]:
        return ids if self.max_length is None else ids[-max(1, self.max_length - room) :]

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False, **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = [(self._cut(context, len(continuation)), continuation) for _, context, continuation in requests]
        return log_likelihoods(self.model, pairs, self.batch_tokens)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text after the start token, the state carried from its first token to its last."""
        log_p = []
        for request in requests:
            ids = [self.prefix_token_id, *self.tok_encode(request.args[0], add_special_tokens=False)]
            score = score_document(self.model, ids, None, len(ids))
            log_p.append(-score.figures["loss"] * score.targets)
        return log_p

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string, each request by its own settings; an answer that never stops ends at its budget."""
        answers: list[str] = [""] * len(requests)
        by_settings: dict[Decoding, list[int]] = {}
        settings = [dict(r.args[1]) for r in requests]
        for i, s in enumerate(settings):
            sampled = bool(s.get("do_sample", False)) and float(s.get("temperature", 1.0) or 0) > 0
            decoding = Decoding(False, float(s.get("temperature", 1.0)), int(s.get("top_k", 0))) if sampled else Decoding()
            by_settings.setdefault(decoding, []).append(i)
        for decoding, members in by_settings.items():
            asked = [Request(i, self._prompt(requests[i].args[0], settings[i]), self._budget(settings[i])) for i in members]
            for batch in answer_all(self.model, asked, self._eos, decoding, self.batch_tokens):
                for request, tokens in batch:
                    text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
                    answers[request.key] = until(text, settings[request.key].get("until"))
        return answers

    def _prompt(self, text: str, settings: dict[str, Any]) -> list[int]:
        return self._cut(self.tok_encode(text), self._budget(settings)) or [self.prefix_token_id]

    def _budget(self, settings: dict[str, Any]) -> int:
        return int(settings.get("max_gen_toks", settings.get("max_new_tokens", DEFAULT_NEW_TOKENS)))


def until(text: str, stops: str | list[str] | None) -> str:
    """The text before the first stop string."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        if stop:
            text = text.split(stop)[0]
    return text


def run_harness(
    model: FastWeightForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str, limit: int, batch_tokens: int, seed: int
) -> dict[str, Any]:
    """One task of lm-eval: its results dictionary. RefineError when it cannot be loaded (offline, unknown name)."""
    wrapped = HarnessModel(model=model, tokenizer=tokenizer, batch_tokens=batch_tokens)
    try:
        results = simple_evaluate(
            wrapped, tasks=[name], limit=limit or None, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
            log_samples=True, bootstrap_iters=1000,
        )  # fmt: skip
    except Exception as error:  # lm-eval wraps network, missing names and data sets in many kinds
        raise RefineError(f"lm-eval could not run {name!r}: {first_line(error)}") from error
    return dict(results)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
