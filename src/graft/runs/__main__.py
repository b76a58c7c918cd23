"""`python -m graft.runs`: a process from which runs are forked, see `forks`."""

import os

from .forks import serve

if __name__ == "__main__":
    serve(int(os.environ.get("OMP_NUM_THREADS", 1)))
