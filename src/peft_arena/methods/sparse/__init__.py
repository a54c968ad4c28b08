"""Methods that train a part of the pretrained parameters: entries, biases, norms, rows of the embedding."""
