"""Models by their names on a hub: fetched, found under a new name, kept for when there is no network, and refused with the fix."""

import json
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


# Commands by their arguments, and what each ended with, said and complained of; then which weights a hybrid was given.
PROGRAM = """
import contextlib, io, json, sys
import refine_nsp
from refine_nsp.cli import main
from refine_nsp.training.scores import weights_key
found = {}
for name in sys.argv[1:]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["generate", name, "--prompt", "def f(", "--max_new_tokens", "4", "--greedy"])
    found[name] = code, out.getvalue(), err.getvalue()
print(json.dumps({"commands": found, "hybrid": weights_key(refine_nsp.load("org/hybrid")[0])}))
"""


@pytest.fixture(scope="module")
def found(folders, tmp_path_factory) -> dict[bool, dict]:
    """By whether there is a network: two processes of one cache, since the address is read at import."""
    cache = tmp_path_factory.mktemp("cache")
    with hub(folders) as address:
        return {
            online: python(names, cache, address, online)
            for online, names in (
                (True, ["org/old-name", BASE, "org/gated", "org/gone"]),
                (False, ["org/old-name", "org/model-2"]),
            )
        }


def python(names: list[str], cache: Path, address: str, online: bool) -> dict:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env |= {"PYTHONPATH": str(ROOT / "src"), "HF_HOME": str(cache), "HF_ENDPOINT": address, "HF_HUB_OFFLINE": str(int(not online)),
            "OMP_NUM_THREADS": "1"}  # fmt: skip
    argv = [sys.executable, "-c", PROGRAM, *names]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_model_is_fetched_once_also_by_the_name_it_had(found):
    code, said, complaint = found[True]["commands"]["org/old-name"]
    assert code == 0 and said.startswith("def f("), complaint
    assert found[False]["commands"]["org/old-name"][:2] == [0, said]
    assert found[True]["commands"][BASE][:2] == [0, said]


def test_a_hybrid_in_several_files(found, folders):
    assert len(list(folders["org/hybrid"].glob("*.safetensors"))) > 1
    expected = weights_key(refine_nsp.load(folders["org/hybrid"])[0])
    assert [found[online]["hybrid"] for online in (True, False)] == [expected, expected]


@pytest.mark.parametrize(
    ("name", "online", "said"),
    [
        ("org/gated", True, "org/gated is gated: accept its terms at https://huggingface.co/org/gated, then log in"),
        ("org/gone", True, "org/gone is not on the hub, or private"),
        ("org/model-2", False, "hf download org/model-2 --local-dir FOLDER"),
    ],
)
def test_what_cannot_be_fetched_is_one_line_with_the_fix(found, name, online, said):
    code, _, complaint = found[online]["commands"][name]
    ours = [line for line in complaint.splitlines() if line.startswith("refine-nsp:")]
    assert code == 1 and len(ours) == 1 and said in ours[0] and "Traceback" not in complaint, complaint
