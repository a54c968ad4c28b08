"""The packaged micro model: a Llama of about a million weights that knows the micro retention tasks.

It is small enough for a laptop and for tests, and loads without a network. ``python -m scripts.micro.build --out DIR``
makes it again, from a checkout of the source.
"""
