"""`python -m tests`: every test, in three processes side by side. All that has a server is for one of them.

The tests of the server mostly wait for it, and have deadlines. So it comes first, by niceness; Ray's workers have that
of their tests, not the 15 that they would be given. What the first two say comes when all are over.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

PYTEST = (sys.executable, "-m", "pytest", "--durations=12")
NICE = ("nice", "-n", "5")
# Torch's threads wait for each other by spinning, which takes the cores from other processes. So there is one thread in
# the tests, and those of a server's replicas wait asleep: half the time where the cores are busy, twice where not.
ENVIRONMENT = os.environ | {"RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
TESTS = Path(__file__).parent
SERVER, ENGINE = str(TESTS / "acceptance"), str(TESTS / "models")


def main() -> int:
    """Gives the status of a part that failed, 0 where none did."""
    with tempfile.TemporaryFile("w+") as server, tempfile.TemporaryFile("w+") as engine:
        parts = [
            subprocess.Popen((*PYTEST, SERVER), stdout=server, stderr=subprocess.STDOUT, env=ENVIRONMENT),
            subprocess.Popen((*NICE, *PYTEST, ENGINE), stdout=engine, stderr=subprocess.STDOUT, env=ENVIRONMENT),
            subprocess.Popen((*NICE, *PYTEST, f"--ignore={SERVER}", f"--ignore={ENGINE}"), env=ENVIRONMENT),
        ]
        try:
            statuses = [part.wait() for part in reversed(parts)]
        finally:
            for part in parts:
                part.terminate()  # of those that still run, where this is interrupted
        for said in (engine, server):
            said.seek(0)
            print(said.read(), flush=True)
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main())
