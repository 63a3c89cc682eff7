"""The files that make a backup every day."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "k8s-free-compose" / "backup"
SCRIPT = FOLDER / "backup-daily.sh"


def test_a_wrong_time_of_day_stops_the_start() -> None:
    environ = os.environ | {"COMP_AI_BACKUP_AT": "soon"}
    done = subprocess.run([SCRIPT], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "COMP_AI_BACKUP_AT is 'soon'" in done.stderr
