"""TFDS datasets that are built without a network, as array_record files: digits and emoji."""
