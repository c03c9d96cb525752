"""What a stranger's files cannot do: run code, reach the network, leave their folder, or become markup."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from refine_nsp.cli import main
from refine_nsp.evaluation.run import rows_path
from refine_nsp.report import html, plots
from refine_nsp.report.card import card
from refine_nsp.report.runs import Run
from refine_nsp.report.tables import Table

REWARD = "refine_nsp.nsp.rewards.edit_similarity"
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
# Every way out, from the first import on.
GUARD = """
import gc, socket
gc.disable()  # loading takes less time
def refuse(*args, **kwargs):
    raise AssertionError(f"network: {args[1:]}")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = refuse
"""


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("def add(a, b):\n    return a + b\n" * 200)
    return path


def midtrain(tmp_path, text, config, *flags):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    common = ["--dataset_name", str(text), "--output_dir", str(tmp_path / "run"), "--use_cpu", "--dry_run"]
    return main(["midtrain", "--config", str(path), *common, *flags])


def test_a_config_does_not_name_code_to_import(tmp_path, text, capsys):
    for named in (REWARD, [REWARD], ["cosine", "os:getcwd"]):
        assert midtrain(tmp_path, text, {"reward_funcs": named}) == 1
        said = capsys.readouterr().err
        assert "reward_funcs names code to import" in said and "--allow_code_in_config" in said and said.count("\n") == 1
    assert midtrain(tmp_path, text, {"reward_funcs": REWARD}, "--allow_code_in_config") == 0
    assert midtrain(tmp_path, text, {"reward_funcs": "cosine"}) == 0
    assert midtrain(tmp_path, text, {}, "--reward_funcs", REWARD) == 0
    capsys.readouterr()
    path = tmp_path / "ttt.yaml"
    path.write_text(yaml.safe_dump({"ttt_reward_funcs": REWARD}))
    assert main(["ttt", "--config", str(path), "--prompt_file", str(text)]) == 1
    assert "ttt_reward_funcs names code to import" in capsys.readouterr().err


def test_a_config_does_not_trust_remote_code(tmp_path, text, capsys):
    assert midtrain(tmp_path, text, {"trust_remote_code": True}) == 1
    assert "unknown key 'trust_remote_code'" in capsys.readouterr().err


def test_a_yaml_file_makes_no_objects(tmp_path, text, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(f"learning_rate: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    assert main(["midtrain", "--config", str(path), "--dataset_name", str(text)]) == 1
    assert "not valid YAML" in capsys.readouterr().err and not (tmp_path / "made").exists()


@pytest.mark.parametrize("task", ["../../out", "/etc/passwd", "a\0b", "..", "lm_eval:../x", "a\nb"])
def test_a_task_cannot_leave_its_folder(tmp_path, task):
    path = rows_path(tmp_path, task, 0)
    assert path.resolve().parent == (tmp_path / "examples").resolve()
    path.parent.mkdir()
    path.write_text("")


def test_a_page_shows_markup_as_text():
    table = Table(HOSTILE, [HOSTILE], [[HOSTILE]], notes=[HOSTILE])
    plot = plots.line_plot({HOSTILE: ([1, 2], [1, 2]), "$x^{": ([1, 2], [2, 1])}, HOSTILE, "$a_{")
    page = html.page(
        HOSTILE, HOSTILE, [html.Section(HOSTILE, table.html() + html.preformatted(HOSTILE, HOSTILE) + html.plots(plot))]
    )
    assert "<script>alert" not in page and "<img" not in page and page.count("&lt;script&gt;") >= 8


def test_a_model_card_shows_markup_as_text():
    """In every place that takes text of users or files: no link, image, tag, code, row or heading of theirs."""
    hostile = "x](http://a.b) ![i](http://c.d/e.png) [l][r] <b>t</b> www.f.g `c` \\[m](n) &lt; | cell\n# heading"
    environment = {"refine-nsp": hostile, "torch": hostile}
    run = Run(hostile, [], [], "", environment)
    settings = {"preset": hostile, "reward_funcs": [hostile], "lambda_rl": 0.5}
    written = card(run, hostile, [hostile, "."], settings, ["refine"], True)
    body = written.split("---", 2)[2]
    head, text = yaml.safe_load(written.split("---")[1]), re.sub(r"`[^`\n]*`|```.*?```", "", body, flags=re.DOTALL)
    assert head["base_model"] == hostile and "license" not in head
    shown = re.sub(r"\\[!-/:-@[-`{-~]", "", text.replace("![curves](curves.svg)", ""))  # what is left are marks that count
    assert not re.search(
        r"[\[\]*]|!\(|://|www\.|<(?!!-- written by)",
        shown.replace("**Settings**", "").replace("**First and last logged value**", ""),
    )
    assert re.findall(r"^#+ .*", body, flags=re.MULTILINE)[1:] == ["## Measured", "## Limits", "## Cite"]
    rows = [line for line in body.splitlines() if line.startswith(("| preset", "| reward_funcs", "| lambda_rl"))]
    assert [line.count("|") - line.count("\\|") for line in rows] == [3, 3, 3]  # two cells each


@pytest.mark.parametrize("offline", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_nothing_reaches_for_the_network(tmp_path, text, offline):
    """Importing, loading a shipped model, and the commands on it."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(text.read_text()[:1000])
    code = GUARD + (
        "from refine_nsp.cli import main\n"
        "import refine_nsp\n"
        "refine_nsp.load('refine-nsp/tiny-delta-net')\n"
        f"assert main(['generate', '--prompt', 'import', '--max_new_tokens', '2']) == 0\n"
        f"assert main(['midtrain', '--dataset_name', {str(text)!r}, '--max_length', '128', '--dry_run', '--use_cpu',"
        f" '--output_dir', {str(tmp_path / 'run')!r}]) == 0\n"
        f"assert main(['midtrain', '--dataset_name', {str(text)!r}, '--max_length', '128', '--max_steps', '1', '--use_cpu',"
        f" '--positions_per_sequence', '2', '--output_dir', {str(tmp_path / 'run')!r}]) == 0\n"
        f"assert main(['report', {str(tmp_path / 'run')!r}, '--output', {str(tmp_path / 'page.html')!r}]) == 0\n"
        f"assert main(['ttt', '--prompt_file', {str(prompt)!r}, '--max_new_tokens', '1']) == 0\n"
        f"assert main(['evaluate', '--tasks', 'niah_single_1', '--lengths', '512', '--samples', '1', '--output_dir',"
        f" {str(tmp_path / 'evaluation')!r}]) == 0\n"
    )
    environment = {"HF_HUB_OFFLINE": offline, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1] / "src")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0 and "network:" not in done.stderr, done.stderr
