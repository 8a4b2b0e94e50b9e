"""Names that published checkpoints give their arrays -> ours. Data only; `convert` does the work.

Before the rules run, "/" becomes "." in every name, so that one table serves Hugging Face's PyTorch and
Flax files. After them, ".weight" becomes ".kernel" (".scale" of a norm) and "." becomes "/".
"""

import dataclasses

from lmeraser_jax.models.architectures import Gelu

Rules = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Origin:
    """One way of naming; `epsilon` and `gelu` are those of the origin's code, where no config.json says otherwise."""

    name: str  # for messages
    family: str  # vit | swin
    markers: tuple[str, ...]  # names that all files of this origin have
    rules: Rules  # (pattern, replacement), applied in order
    ignored: tuple[str, ...] = ()  # patterns of names that are no parameters of ours
    epsilon: float = 1e-6
    gelu: Gelu = "erf"
    antialias: bool = True  # how its code resizes position embeddings (`vit.interpolate_positions`)


HUGGING_FACE_BLOCK: Rules = (
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attention.out."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)
TIMM_BLOCK: Rules = (
    (r"^patch_embed\.proj\.", "embed."),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.attn\.proj\.", ".attention.out."),
    (r"^head\.fc\.", "head."),
)
TIMM_SWIN: Rules = (
    *TIMM_BLOCK,
    (r"^patch_embed\.norm\.", "embed_norm."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"\.attn\.relative_position_bias_table$", ".attention.table"),
)
SWIN_BUFFERS = (r"\.relative_position_index$", r"\.attn_mask$", r"mask_token$")

ORIGINS = (
    Origin(
        "Hugging Face ViT",
        "vit",
        ("embeddings.cls_token", "embeddings.position_embeddings"),
        (
            (r"^embeddings\.cls_token$", "cls"),
            (r"^embeddings\.position_embeddings$", "positions"),
            (r"^embeddings\.patch_embeddings\.projection\.", "embed."),
            (r"^encoder\.layer\.", "blocks."),
            (r"\.attention\.attention\.", ".attention."),
            (r"^pooler\.dense\.", "pooler."),
            *HUGGING_FACE_BLOCK,
        ),
        ignored=(r"mask_token$",),
        epsilon=1e-12,
        antialias=False,
    ),
    Origin(
        "Hugging Face Swin",
        "swin",
        ("embeddings.norm.weight", "encoder.layers.0.blocks.0.layernorm_before.weight"),
        (
            (r"^embeddings\.norm\.", "embed_norm."),
            (r"^embeddings\.patch_embeddings\.projection\.", "embed."),
            (r"^encoder\.layers\.", "stages."),
            (r"\.attention\.self\.relative_position_bias_table$", ".attention.table"),
            (r"\.attention\.self\.", ".attention."),
            (r"\.downsample\.", ".merging."),
            *HUGGING_FACE_BLOCK,
        ),
        ignored=SWIN_BUFFERS,
        epsilon=1e-5,
    ),
    Origin(
        "timm ViT",
        "vit",
        ("cls_token", "pos_embed", "patch_embed.proj.weight"),
        (*TIMM_BLOCK, (r"^cls_token$", "cls"), (r"^pos_embed$", "positions"), (r"^pre_logits\.fc\.", "pooler.")),
    ),
    Origin(  # merging stands at the end of a stage, as in the authors' own code
        "Microsoft Swin",
        "swin",
        ("layers.0.blocks.0.attn.qkv.weight", "layers.0.downsample.norm.weight"),
        (*TIMM_SWIN, (r"^layers\.(\d+)\.downsample\.", r"stages.\1.merging.")),
        ignored=SWIN_BUFFERS,
        epsilon=1e-5,
    ),
    Origin(  # merging stands at the beginning of the next stage
        "timm Swin",
        "swin",
        ("layers.0.blocks.0.attn.qkv.weight",),
        (*TIMM_SWIN, *((rf"^layers\.{s + 1}\.downsample\.", f"stages.{s}.merging.") for s in range(8))),
        ignored=SWIN_BUFFERS,
        epsilon=1e-5,
    ),
    Origin(  # its code uses Flax's default GELU, the tanh approximation
        "vision_transformer ViT",
        "vit",
        ("cls", "embedding.kernel", "Transformer.posembed_input.pos_embedding"),
        (
            (r"^embedding\.", "embed."),
            (r"^Transformer\.posembed_input\.pos_embedding$", "positions"),
            (r"^Transformer\.encoder_norm\.", "norm."),
            (r"^Transformer\.encoderblock_", "blocks."),
            (r"\.LayerNorm_0\.", ".norm1."),
            (r"\.LayerNorm_2\.", ".norm2."),
            (r"\.MultiHeadDotProductAttention_1\.", ".attention."),
            (r"\.MlpBlock_3\.Dense_0\.", ".mlp.fc1."),
            (r"\.MlpBlock_3\.Dense_1\.", ".mlp.fc2."),
            (r"^pre_logits\.", "pooler."),
        ),
        gelu="tanh",
    ),
)
PREFIXES = r"^((vit|swin|model|module|timm_model|opt\.target)\.)+"  # of whole models, stripped
FINAL_RULES: Rules = ((r"(norm\d?)\.weight$", r"\1.scale"), (r"\.weight$", ".kernel"), (r"\.", "/"))
