"""A request for images: the condition of each, and what guidance leads away from."""

import dataclasses
import hashlib

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """The conditions of N images, labels [N] or token ids [N, M], and their null conditions."""

    cond: np.ndarray  # int32
    null: np.ndarray  # like cond, to lead away from: the null class, '', or a negative prompt

    def __len__(self) -> int:
        return len(self.cond)

    def digest(self) -> str:
        """Returns 16 hexadecimal digits that identify both arrays."""
        return hashlib.sha256(self.cond.tobytes() + self.null.tobytes()).hexdigest()[:16]

    def rows(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the arrays of the images with these numbers, by name."""
        return {"cond": self.cond[index], "null": self.null[index]}
