"""A request for images: the condition and the null condition of each."""

import dataclasses
import hashlib

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """The conditions of N images, such as labels [N], and the null conditions for guidance."""

    cond: np.ndarray  # [N, ...], int32 for labels [N] and token ids [N, M]
    null: np.ndarray  # like cond: the null class, the empty caption or a negative prompt

    def __len__(self) -> int:
        return len(self.cond)

    def digest(self) -> str:
        """Returns 16 hexadecimal digits that identify both arrays."""
        return hashlib.sha256(self.cond.tobytes() + self.null.tobytes()).hexdigest()[:16]

    def rows(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the arrays of the images at these indices, by name."""
        return {"cond": self.cond[index], "null": self.null[index]}
