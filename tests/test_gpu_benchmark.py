"""The benchmark for GPUs runs where there is none, on tiny models; its figures then say nothing."""

import json
from pathlib import Path

from tests.children import run_script

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"


def test_every_candidate_is_run_and_written_down(tmp_path):
    flags = ["--device", "cpu", "--tiny", "--lengths", "80", "--rounds", "1", "--output", str(tmp_path / "gpu")]
    code, said = run_script(SCRIPT, flags, tmp_path / "log.txt")
    assert code == 0, said
    record = json.loads((tmp_path / "gpu.json").read_text())
    steps = ["NTP", "closed form, cached scores", "closed form", "fused N=1", "fused N=8", "snapshot N=1"]
    assert [(f["model"], f["step"]) for f in record["figures"]] == [(m, s) for m in ("delta_net", "lact") for s in steps]
    for f in record["figures"]:
        assert f["tokens_per_second"] > 0 and f["share_of_peak"] > 0 and len(f["seconds"]) == 1
        assert f["peak_gib"] is None and f["waits"] is None and f["relative_to_fla"] is None  # of a device
    page = (tmp_path / "gpu.md").read_text()
    assert "| 80 | fused N=8 |" in page and "goal at 16K" in page
