"""Models whose training is measured by `measured_job.py` and counted by `test_estimate.py`: the same in both processes."""

from typing import Any

from transformers import AutoModelForCausalLM, BambaConfig, Qwen3_5TextConfig

from refine_nsp.models import DeltaNetConfig, DeltaNetForCausalLM, with_states
from refine_nsp.training import ReFINEConfig

SMALL = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
LARGE = dict(vocab_size=8192, hidden_size=512, intermediate_size=1024, num_hidden_layers=4)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=3)
DELTA = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=32, head_dim=32)
MAMBA = dict(mamba_n_heads=8, mamba_d_state=32, mamba_chunk_size=64, attn_layer_indices=[1])


def config_of(name: str, sizes: dict[str, int]) -> Any:
    if name == "delta_net":
        return DeltaNetConfig(**sizes, num_heads=4)
    if name == "bamba":
        return BambaConfig(**sizes, **HEADS, **MAMBA, mamba_expand=2, mamba_d_head=sizes["hidden_size"] // 4)
    types = ["linear_attention", "full_attention"] * (sizes["num_hidden_layers"] // 2)
    return Qwen3_5TextConfig(**sizes, **HEADS, **DELTA, layer_types=types)


def model_of(name: str, sizes: dict[str, int]) -> Any:
    config = config_of(name, sizes)
    if name == "delta_net":
        return DeltaNetForCausalLM(config)
    return with_states(AutoModelForCausalLM.from_config(config))


def arguments(name: str, folder: str = "x") -> ReFINEConfig:
    return ReFINEConfig(  # the second step is the first that has all: the optimizer's state, gradients and activations
        output_dir=folder, max_steps=2, max_length=1024, per_device_train_batch_size=1, objective="ntp", use_cpu=True, report_to="none",
        save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
