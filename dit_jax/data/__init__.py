"""Images, labels and captions: from folders, TFDS and moments to batches of each step.

Nothing here needs an accelerator; `loader` alone imports JAX, so that workers start quickly.
"""
