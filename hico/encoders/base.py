"""What every vision encoder offers."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

Grid = tuple[int, int, int]
"""Tokens of one clip along time, rows and columns; ``L`` is their product."""


class VisionEncoder(nn.Module, ABC):
    """Turn clips of frames into tokens.

    Subclasses set these attributes in their constructor; they must be right on the meta device too.
    """

    hidden_size: int
    """Width D of a token."""
    num_heads: int
    """Attention heads; token merging splits the channels the same way."""
    image_size: int
    """Pixels per side that frames and image tiles are resized to."""
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means of pixels in [0, 1]."""
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channel deviations of pixels in [0, 1]."""
    gradient_checkpointing: bool = False

    @abstractmethod
    def grid(self, num_frames: int, height: int, width: int) -> Grid:
        """Say how many tokens a clip yields, without running it.

        Args:
            num_frames: frames per clip; 1 for an image.
            height: pixels.
            width: pixels.

        Raises:
            ValueError: if the sizes do not fit the encoder's patches.
        """

    @abstractmethod
    def forward(self, clips_NTCHW: Tensor) -> Tensor:
        """Encode normalised clips ``(N, T, 3, H, W)`` to tokens ``(N, L, D)``, time-major, then rows."""
