"""What all tests share: the machine, with each other."""

import os

# Several processes run tests at a time: threads that wait for each other at every barrier would wait for turns too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
