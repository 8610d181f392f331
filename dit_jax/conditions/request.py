"""The conditions of the images that are asked for."""

import dataclasses
import hashlib

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """The conditions of N images: labels [N] or token ids [N, M], and what guidance leads from."""

    cond: np.ndarray  # int32
    null: np.ndarray  # like cond: the null class, the empty caption, or another to be avoided

    def __len__(self) -> int:
        return len(self.cond)

    def digest(self) -> str:
        """Returns 16 hexadecimal digits of both arrays."""
        return hashlib.sha256(self.cond.tobytes() + self.null.tobytes()).hexdigest()[:16]

    def rows(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the arrays of the images of these numbers, by name."""
        return {"cond": self.cond[index], "null": self.null[index]}
