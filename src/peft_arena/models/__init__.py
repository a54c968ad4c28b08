"""Base models and tokenizers at a pinned revision, chat rendering, the packaged micro model, asset sources."""
