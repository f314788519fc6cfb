"""What a model sees of an image, and the way back to the image's own pixels."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageView:
    """What a model sees of an image, and where that lies in the image.

    Attributes:
      pixels: float32 [height, width, 3], normalised: the model's input.
      shown: uint8 [height, width, 3], the same before it was normalised: what to
        draw scores on.
      size: Height and width of the upright original, in pixels.
      box: The part of the original that `pixels` covers, as (left, top, right,
        bottom) in its pixels. It reaches beyond the original where the crop is
        padded.
      patch: Height and width of the model's patches, in pixels of `pixels`; None
        where the checkpoint does not say.
    """

    pixels: np.ndarray
    shown: np.ndarray
    size: tuple[int, int]
    box: tuple[float, float, float, float]
    patch: tuple[int, int] | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of whole patches.

        Raises:
          ValueError: If the size of a patch is not known.
        """
        if self.patch is None:
            raise ValueError("the checkpoint does not say how large a patch is")
        height, width, _ = self.pixels.shape
        return height // self.patch[0], width // self.patch[1]

    def as_grid(self, scores: np.ndarray) -> np.ndarray:
        """Lays scores of tokens out as patches.

        Class, distillation and register tokens come first and are left out.

        Args:
          scores: [..., tokens].

        Returns:
          [..., rows, columns].

        Raises:
          ValueError: If there are fewer tokens than patches.
        """
        scores, (rows, columns) = np.asarray(scores), self.grid
        if scores.ndim < 1 or scores.shape[-1] < rows * columns:
            raise ValueError(
                f"`scores` has shape {scores.shape}, but there are {rows} x {columns} "
                "patches"
            )
        patches = scores[..., scores.shape[-1] - rows * columns :]
        return patches.reshape(*scores.shape[:-1], rows, columns)

    def patch_boxes(self) -> np.ndarray:
        """Where each patch lies in the original.

        Returns:
          float64 [rows, columns, 4]: (left, top, right, bottom) in its pixels.
        """
        rows, columns = self.grid
        assert self.patch is not None
        left, top, right, bottom = self.box
        height, width, _ = self.pixels.shape
        across = left + (right - left) / width * self.patch[1] * np.arange(columns + 1)
        down = top + (bottom - top) / height * self.patch[0] * np.arange(rows + 1)
        boxes = np.empty((rows, columns, 4))
        boxes[..., 0], boxes[..., 2] = across[:-1], across[1:]
        boxes[..., 1], boxes[..., 3] = down[:-1, None], down[1:, None]
        return boxes

    def to_original(self, scores: np.ndarray) -> np.ndarray:
        """Spreads scores over the pixels of the original.

        A pixel of the original gets the score of the patch, or of the pixel of
        `pixels`, that its centre lies in.

        Args:
          scores: [rows, columns] of patches, as `as_grid` returns them, or [height,
            width] of `pixels`.

        Returns:
          float32 of the original's size; NaN where the model does not look.

        Raises:
          ValueError: If the shape is neither.
        """
        scores = np.asarray(scores, np.float32)
        if scores.shape == self.pixels.shape[:2]:
            cell = (1, 1)
        elif self.patch is not None and scores.shape == self.grid:
            cell = self.patch
        else:
            wanted = [self.pixels.shape[:2], *([self.grid] if self.patch else [])]
            raise ValueError(
                f"`scores` has shape {scores.shape}, wanted "
                f"{' or '.join(map(str, wanted))}"
            )
        index = []
        for axis, begin, end in ((0, 1, 3), (1, 0, 2)):
            centres = np.arange(self.size[axis]) + 0.5
            share = (centres - self.box[begin]) / (self.box[end] - self.box[begin])
            place = np.floor(share * self.pixels.shape[axis] / cell[axis]).astype(int)
            # One cell of NaN on either side takes what lies outside.
            index.append(np.clip(place, -1, scores.shape[axis]) + 1)
        padded = np.pad(scores, 1, constant_values=np.nan)
        return padded[np.ix_(*index)]
