"""Models by their names on a hub: fetched, found under a new name, kept for when there is no network, and refused with the fix."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import refine_nsp
from refine_nsp.training.scores import weights_key
from tests.hub import hub
from tests.models.transformers_models import plain

ROOT = Path(__file__).resolve().parents[2]
BASE = "refine-nsp/tiny-delta-net"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A shipped model, and a hybrid of transformers in several files."""
    model, hybrid = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("hybrid")
    base, tokenizer = refine_nsp.load(BASE)
    base.save_pretrained(model)
    plain("qwen3_next", dtype=torch.float32).save_pretrained(hybrid, max_shard_size="20KB")
    for folder in (model, hybrid):
        tokenizer.save_pretrained(folder)
    return {"org/model": model, "org/hybrid": hybrid}


@pytest.fixture(scope="module")
def address(folders):
    with hub(folders) as address:
        yield address


def python(code: str, cache: Path, address: str, offline: bool = False) -> subprocess.CompletedProcess:
    """In a process of its own: the address is read at import."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env |= {"PYTHONPATH": str(ROOT / "src"), "HF_HOME": str(cache), "HF_ENDPOINT": address, "HF_HUB_OFFLINE": str(int(offline)),
            "OMP_NUM_THREADS": "1"}  # fmt: skip
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False)


def generate(name: str, *place, **how) -> subprocess.CompletedProcess:
    argv = ["generate", name, "--prompt", "def f(", "--max_new_tokens", "4", "--greedy"]
    return python(f"import sys; from refine_nsp.cli import main; sys.exit(main({argv!r}))", *place, **how)


def test_a_model_is_fetched_once_also_by_the_name_it_had(tmp_path, address):
    fetched = generate("org/old-name", tmp_path, address)
    assert fetched.returncode == 0 and fetched.stdout.startswith("def f("), fetched.stderr
    again = generate("org/old-name", tmp_path, address, offline=True)
    assert (again.returncode, again.stdout) == (0, fetched.stdout), again.stderr
    assert generate(BASE, tmp_path, address).stdout == fetched.stdout


def test_a_hybrid_in_several_files(tmp_path, address, folders):
    assert len(list(folders["org/hybrid"].glob("*.safetensors"))) > 1
    code = "import refine_nsp; from refine_nsp.training.scores import weights_key; print(weights_key(refine_nsp.load('org/hybrid')[0]))"
    found = python(code, tmp_path, address)
    expected = weights_key(refine_nsp.load(folders["org/hybrid"])[0])
    assert found.returncode == 0 and found.stdout.split() == [expected], found.stderr


@pytest.mark.parametrize(
    ("name", "offline", "said"),
    [
        ("org/gated", False, "org/gated is gated: accept its terms at https://huggingface.co/org/gated, then log in"),
        ("org/gone", False, "org/gone is not on the hub, or private"),
        ("org/model", True, "hf download org/model --local-dir FOLDER"),
    ],
)
def test_what_cannot_be_fetched_is_one_line_with_the_fix(tmp_path, address, name, offline, said):
    ended = generate(name, tmp_path, address, offline=offline)
    ours = [line for line in ended.stderr.splitlines() if line.startswith("refine-nsp:")]
    assert ended.returncode == 1 and len(ours) == 1 and said in ours[0] and "Traceback" not in ended.stderr, ended.stderr
