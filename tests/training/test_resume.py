import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork") or not hasattr(signal, "SIGKILL"), reason="needs fork and SIGKILL")
def test_a_run_killed_at_any_moment_comes_to_the_same_bits(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run(
        [sys.executable, Path(__file__).parent / "kill_driver.py", tmp_path],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr[-3000:]
    told = json.loads(out.stdout.splitlines()[-1])
    reference = told["reference"]
    assert sum(o["kills"] for o in told["outcomes"]) >= len(told["outcomes"])
    for outcome in told["outcomes"]:
        for what in ("bits", "history", "metrics", "steps"):
            assert outcome["result"][what] == reference[what], (outcome["at"], what)
