"""Imported once by the process that workers are forked from: everything that is slow to import, nothing that runs."""

import accelerate  # noqa: F401
import datasets  # noqa: F401
import lm_eval  # noqa: F401
import peft  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401
import trl  # noqa: F401
