"""Shared by all tests: no network, few threads because tests run side by side, and the recipes of bases to import."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parents[1] / "bases"))
sys.path.insert(0, str(Path(__file__).parent))

import torch

torch.set_num_threads(1)
