"""`python -m tests`: every test, in two processes side by side. All that has a server is for one of them.

The tests of the server mostly wait for it, so the others cost hardly more time. Ray's workers have a niceness of 15
(`RAY_worker_niceness`): so have the others, nearly, or they would hold the server up. What is said of it comes last.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

PYTEST = (sys.executable, "-m", "pytest")
NICENESS = "12"
SERVER = str(Path(__file__).parent / "acceptance")


def main() -> int:
    """Gives the status of the half that failed, 0 where none did."""
    with tempfile.TemporaryFile("w+") as said:
        halves = [
            subprocess.Popen((*PYTEST, SERVER), stdout=said, stderr=subprocess.STDOUT),
            subprocess.Popen(("nice", "-n", NICENESS, *PYTEST, f"--ignore={SERVER}")),
        ]
        try:
            others = halves[1].wait()
            server = halves[0].wait()
        finally:
            for half in halves:
                half.terminate()  # of those that still run, where this is interrupted
        said.seek(0)
        print(said.read(), flush=True)
    return others or server


if __name__ == "__main__":
    sys.exit(main())
