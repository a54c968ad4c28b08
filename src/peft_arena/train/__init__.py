"""Training, thin over TRL: data order, loss, save points, resume. :mod:`peft_arena.train.sft` is the way in."""
