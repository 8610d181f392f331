"""TFDS datasets that need no network, written as array_record: digits and emoji."""
