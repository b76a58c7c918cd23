"""Shared by all tests: no network, a cache of their own, few threads because tests run side by side, and the recipes of
bases to import."""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parents[1] / "bases"))
sys.path.insert(0, str(Path(__file__).parent))

import torch

torch.set_num_threads(1)
CACHE = tempfile.TemporaryDirectory()  # for as long as this process, and those which it starts
os.environ["GRAFT_CACHE"] = CACHE.name
