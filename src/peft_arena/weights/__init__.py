"""From a checkpoint to weights: the pretrained ones and their change, one module at a time."""
