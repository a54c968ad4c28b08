"""No test looks for a model or data hub: every look-up would wait for a network that may not be there."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
