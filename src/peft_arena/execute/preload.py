"""Imported once by the process that workers are forked from: everything that is slow to import, nothing that runs.

Our own modules are among them so that all runs of one command use the same code, whatever is edited meanwhile; the
commit of that code is asked for here for the same reason.
"""

import contextlib

import accelerate  # noqa: F401
import datasets  # noqa: F401
import lm_eval.evaluator  # noqa: F401
import peft  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401
import trl  # noqa: F401

import peft_arena.cost.memory
import peft_arena.cost.record
import peft_arena.evaluate.adapter
import peft_arena.evaluate.engine
import peft_arena.evaluate.run
import peft_arena.evaluate.session
import peft_arena.execute.geometry
import peft_arena.execute.local
import peft_arena.geometry.measure_activations
import peft_arena.geometry.measure_drift
import peft_arena.geometry.measure_spectra
import peft_arena.models.load
import peft_arena.train.rl_session
import peft_arena.train.sft_session  # noqa: F401
from peft_arena.core.provenance import provenance

provenance()
with contextlib.suppress(Exception):  # a table that loading any model makes first: 0.2 s in each worker else
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("")
