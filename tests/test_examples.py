"""Examples run as their first lines say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.dist
def test_checkpoint_reshard_gives_the_same_logits_at_every_expert_parallelism():
    """The script itself compares them; it is run with four processes, and has to say so for 4, 2 and 1."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=4", "--standalone"]
    script = EXAMPLES / "04_checkpoint_reshard.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, script], capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    said = [line for line in done.stdout.splitlines() if line.startswith("saved at EP=4")]
    wanted = [f"saved at EP=4, loaded at EP={ep}: {8 // ep} of 8 amax on rank 0, the same logits" for ep in (4, 2, 1)]
    assert said == wanted
