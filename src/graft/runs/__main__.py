"""`python -m graft.runs FOLDER CONFIGURATION`: one run, whose record is put into the folder.

It ends when its standard input does: with the process that started it, however that died.
"""

import json
import os
import sys
import threading


def main(folder: str, configuration: str) -> None:
    threading.Thread(target=_watch, daemon=True).start()
    import torch

    from .configuration import Configuration
    from .single import perform
    from .store import Store

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    Store(folder).put(perform(Configuration.of(json.loads(configuration))))


def _watch() -> None:
    if not os.read(0, 1):
        os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
