"""Ctrl-C in the seconds in which PyTorch is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("command", [["train.py"], ["-m", "nanollava.bench"], ["-m", "nanollava.train.curves"]])
def test_ctrl_c_while_pytorch_is_imported_is_no_traceback(command, tmp_path):
    """What Python does at Ctrl-C, in a torch that is found first."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    path = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    words = [sys.executable, *command, "--help"]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
