"""Models by their names on a hub: fetched, found under a new name, kept for when there is no network, and refused with the fix."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch

import refine_nsp
from refine_nsp.cli import main
from refine_nsp.training.scores import weights_key
from tests.children import exit_code, fork
from tests.hub import hub, turn_to
from tests.models.transformers_models import plain

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
def found(folders, tmp_path_factory) -> dict[bool, dict]:
    """By whether there is a network: two processes of one cache, since the address is read at import."""
    cache = tmp_path_factory.mktemp("cache")
    with hub(folders) as address:
        return {
            online: in_a_process(names, cache, address, online)
            for online, names in (
                (True, ["org/old-name", BASE, "org/gated", "org/gone"]),
                (False, ["org/old-name", "org/model-2"]),
            )
        }


def in_a_process(names: list[str], cache: Path, address: str, online: bool) -> dict:
    """What `generate` with each model ended with, said and complained of; then which weights a hybrid was given."""
    log, result = cache / "log.txt", cache / "found.json"

    def generate() -> None:
        turn_to(address, cache, offline=not online)
        commands = {}
        for name in names:
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(["generate", name, "--prompt", "def f(", "--max_new_tokens", "4", "--greedy"])
            commands[name] = code, out.getvalue(), err.getvalue()
        result.write_text(json.dumps({"commands": commands, "hybrid": weights_key(refine_nsp.load("org/hybrid")[0])}))

    assert exit_code(fork(generate, log, {})) == 0, log.read_text()
    return json.loads(result.read_text())


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
