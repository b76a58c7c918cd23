"""The recipes, which lie outside the package, as modules."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "bases"))
