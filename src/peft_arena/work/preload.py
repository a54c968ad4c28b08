"""Imported once by the process that workers are forked from: everything that is slow to import, nothing that runs.

Our own modules are among them so that all runs of one command use the same code, whatever is edited meanwhile; the
commit of that code is asked for here for the same reason.
"""

# ruff: noqa: F401
import contextlib

import accelerate
import datasets
import lm_eval.evaluator
import peft
import torch
import transformers
import trl

import peft_arena.cost.memory
import peft_arena.cost.record
import peft_arena.evaluate.adapter
import peft_arena.evaluate.engine
import peft_arena.evaluate.run
import peft_arena.evaluate.session
import peft_arena.geometry.measure_activations
import peft_arena.geometry.measure_drift
import peft_arena.geometry.measure_run
import peft_arena.geometry.measure_spectra
import peft_arena.models.load
import peft_arena.train.rl_session
import peft_arena.train.sft_session
import peft_arena.work.pool
from peft_arena.core.provenance import provenance

provenance()
with contextlib.suppress(Exception):  # a table that loading any model makes first: 0.2 s in each worker else
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("")
