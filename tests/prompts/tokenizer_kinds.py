"""Tokenizers of every kind that puts something around a text: one vocabulary, and what stands before and behind."""

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from refine_nsp.models.load import load_tokenizer

SPECIAL = ("<s>", "</s>", "[CLS]", "[SEP]")
LEADING = {"gpt2": [], "llama": ["<s>"], "both": ["<s>"], "t5": [], "bert": ["[CLS]"], "byt5": []}  # what stands before a text
PATTERNS = {"llama": "<s> $A", "both": "<s> $A </s>", "t5": "$A </s>", "bert": "[CLS] $A [SEP]"}
TEMPLATES = {
    "writes_bos": "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    "turns": "{% for m in messages %}<{{ m.role }}>\n{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}",
    "one_role": "{{ bos_token }}{% for m in messages %}<user>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}",
}


def tokenizer_of(kind: str) -> PreTrainedTokenizerBase:
    """A tokenizer with BOS <s>, EOS </s> and a post-processor of that kind; `byt5` has no fast backend, and no BOS."""
    if kind == "byt5":
        return ByT5Tokenizer()
    raw = Tokenizer.from_str(load_tokenizer("refine-nsp/tiny-delta-net").backend_tokenizer.to_str())
    raw.add_special_tokens(list(SPECIAL))
    if kind in PATTERNS:
        ids = [(token, raw.token_to_id(token)) for token in SPECIAL]
        raw.post_processor = TemplateProcessing(single=PATTERNS[kind], special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
