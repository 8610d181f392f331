"""Input pipeline: images and their annotations from folders, TFDS and moments to batches.

Nothing here needs an accelerator. Only `loader` imports JAX, so that workers start quickly.
"""
