"""Files out of pinned packages of PyPI, and the cache of what was made of them."""
