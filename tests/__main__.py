"""`python -m tests`: every test, in two processes side by side. All that has a server is for one of them.

The tests of the server mostly wait for it, and have deadlines. So it comes first: its workers have not the niceness of
15 that Ray would give them, and the others have one. What is said of it comes last.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

PYTEST = (sys.executable, "-m", "pytest")
NICENESS = "10"
WORKERS = {"RAY_worker_niceness": "0"}
SERVER = str(Path(__file__).parent / "acceptance")


def main() -> int:
    """Gives the status of the half that failed, 0 where none did."""
    with tempfile.TemporaryFile("w+") as said:
        halves = [
            subprocess.Popen((*PYTEST, SERVER), stdout=said, stderr=subprocess.STDOUT, env=os.environ | WORKERS),
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
