import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graft.training import checkpoints


@pytest.mark.slow
def test_two_processes_come_to_the_parameters_of_one(tmp_path):
    states = []
    for processes in (1, 2):
        run = tmp_path / str(processes)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        path = os.pathsep.join(sys.path)
        environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        out = subprocess.run(
            [*command, Path(__file__).parent / "processes_driver.py", run],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert (run / "history.jsonl").exists(), out.stderr[-3000:]
        states.append(checkpoints.newest(run))
    assert states[0][0] == states[1][0] == 6 and len(states[1][1]["random"]) == 2
    one, two = (s[1]["tensors"]["adapters"]["default"] for s in states)
    assert all(torch.allclose(one[k], two[k], atol=1e-5) for k in one)
    metrics = [s[1]["best"]["metrics"] for s in states]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)
