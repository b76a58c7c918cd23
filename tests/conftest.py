"""Shared by all tests: no network, and few threads, because tests run side by side."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "bases")]

import torch

torch.set_num_threads(1)
