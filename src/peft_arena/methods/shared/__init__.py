"""Methods whose layers share random or trained tensors, with few numbers of their own in each."""
