"""From the width of visual tokens to the width of the language model."""

from torch import Tensor, nn


class MLPProjector(nn.Module):
    """Project tokens with two linear layers and an exact GELU between them.

    Args:
        in_features: width D of a visual token.
        out_features: width E of the language model.
        hidden_features: width between the two layers; ``out_features`` if omitted, as published.

    The layers are ``mlp.0`` and ``mlp.2``, as in the checkpoints of VideoChat-Flash.

    Source: Li et al., "VideoChat-Flash", arXiv:2501.00574; Zhang et al., "LongVA", arXiv:2406.16852.
    """

    def __init__(self, in_features: int, out_features: int, *, hidden_features: int | None = None):
        super().__init__()
        hidden_features = hidden_features or out_features
        self.mlp = nn.Sequential(
            nn.Linear(in_features, hidden_features), nn.GELU(), nn.Linear(hidden_features, out_features)
        )

    def forward(self, tokens_NKD: Tensor) -> Tensor:
        """Project ``(..., D)`` to ``(..., E)``."""
        return self.mlp(tokens_NKD)
