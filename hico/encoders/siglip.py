"""SigLIP's vision transformer, frame by frame."""

from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from hico.encoders.base import FrameEncoder, num_blocks_to_build, unused_by_frame_encoders


class SiglipEncoder(FrameEncoder):
    """Encode frames one by one with SigLIP.

    The defaults are SigLIP-so400m/14 at 384 pixels, with 27 x 27 tokens per frame. Parameters are ``vision_model.``
    and the names of transformers' ``SiglipVisionModel``, without those that do not run.

    Args:
        image_size: pixels per side; frames must have this size, since positions are learned.
        patch_size: pixels per side of a patch.
        hidden_size: width D.
        intermediate_size: width of a layer's MLP.
        depth: layers of the pretrained network; see ``feature_layer``.
        num_heads: attention heads.
        feature_layer: the layer whose output is returned, counted from the end: -1 is the last one. No norm follows
            it, and later layers are not built.
        hidden_act: activation of the MLP, by the name that transformers gives it.
        attn_implementation: any name that transformers knows.

    Raises:
        ValueError: if the settings contradict each other.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", arXiv:2303.15343.
    """

    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)

    def __init__(
        self,
        *,
        image_size: int = 384,
        patch_size: int = 14,
        hidden_size: int = 1152,
        intermediate_size: int = 4304,
        depth: int = 27,
        num_heads: int = 16,
        feature_layer: int = -2,
        hidden_act: str = "gelu_pytorch_tanh",
        attn_implementation: str = "sdpa",
    ):
        super().__init__()
        self.image_size = image_size
        self.patch_size = patch_size
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        config = SiglipVisionConfig(
            image_size=image_size,
            patch_size=patch_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_blocks_to_build(depth, feature_layer, setting="feature_layer"),
            num_attention_heads=num_heads,
            hidden_act=hidden_act,
            vision_use_head=False,
            attn_implementation=attn_implementation,
        )
        self.vision_model = SiglipVisionModel(config)
        self.vision_model.post_layernorm = nn.Identity()  # the output is a hidden state, not the normed one
        self._keys_to_ignore_on_load_unexpected = unused_by_frame_encoders(config.num_hidden_layers)
