"""How the names of models look: ids on the Hugging Face hub, and bases that ship."""

import re

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SHIPPED = "graft:"  # followed by the name of a base
