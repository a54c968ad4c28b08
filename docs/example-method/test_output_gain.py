"""Every check of peft-arena's conformance suite, one test each."""

from arena_output_gain import OutputGain

from peft_arena.testing import method_tests

test_conformance = method_tests(OutputGain, learning_rate=2e-2)
