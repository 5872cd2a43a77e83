"""CLIP's vision transformer, frame by frame: the encoder of LongVA."""

from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from hico.encoders.base import FrameEncoder, num_blocks_to_build, unused_by_frame_encoders


class CLIPEncoder(FrameEncoder):
    """Encode frames one by one with CLIP and drop the class token.

    The defaults are CLIP-L/14 at 336 pixels, with 24 x 24 tokens per frame. Parameters are ``vision_model.`` and the
    names of transformers' ``CLIPVisionModel``, without those that do not run.

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

    Source: Radford et al., "CLIP", arXiv:2103.00020; layer -2 as in Zhang et al., "LongVA", arXiv:2406.16852.
    """

    image_mean = (0.48145466, 0.4578275, 0.40821073)
    image_std = (0.26862954, 0.26130258, 0.27577711)

    def __init__(
        self,
        *,
        image_size: int = 336,
        patch_size: int = 14,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        depth: int = 24,
        num_heads: int = 16,
        feature_layer: int = -2,
        hidden_act: str = "quick_gelu",
        attn_implementation: str = "sdpa",
    ):
        super().__init__()
        self.image_size = image_size
        self.patch_size = patch_size
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        config = CLIPVisionConfig(
            image_size=image_size,
            patch_size=patch_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_blocks_to_build(depth, feature_layer, setting="feature_layer"),
            num_attention_heads=num_heads,
            hidden_act=hidden_act,
            attn_implementation=attn_implementation,
        )
        self.vision_model = CLIPVisionModel(config)
        self.vision_model.post_layernorm = nn.Identity()  # norms the class token, which is dropped
        self._keys_to_ignore_on_load_unexpected = unused_by_frame_encoders(config.num_hidden_layers)
