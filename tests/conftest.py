"""What all tests share: the machine, with each other."""

import os

# Several processes run tests at a time. Threads that wait for each other at every barrier would wait for their turns too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
