"""Names that published checkpoints give their arrays -> ours. Data only; `convert` does the work.

Before the rules run, "/" becomes "." in every name, so that one table serves Hugging Face's PyTorch and
Flax files. After them, ".weight" becomes ".kernel" (".scale" of a norm) and "." becomes "/".
"""

import dataclasses

from lmeraser_jax.models.architectures import Gelu
from lmeraser_jax.models.zoo import CLIP, HALF, IMAGENET, Normalisation

Rules = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Origin:
    """One way of naming; the numerics are those of its code, where no file beside the weights says otherwise."""

    name: str  # for messages
    family: str  # vit | swin | decoder
    markers: tuple[str, ...]  # names that all files of this origin have
    rules: Rules  # (pattern, replacement), applied in order
    ignored: tuple[str, ...] = ()  # patterns of names that are no parameters of ours
    epsilon: float = 1e-6
    gelu: Gelu = "erf"
    antialias: bool = True  # how its code resizes position embeddings (`vit.interpolate_positions`)
    normalisation: Normalisation = HALF
    model_type: str = ""  # in a config.json of transformers; "": the family


HUGGING_FACE_BLOCK: Rules = (
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attention.out."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)
HUGGING_FACE_VIT: Rules = (
    (r"^embeddings\.cls_token$", "cls"),
    (r"^embeddings\.position_embeddings$", "positions"),
    (r"^embeddings\.patch_embeddings\.projection\.", "embed."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.", ".attention."),
    (r"^pooler\.dense\.", "pooler."),
    *HUGGING_FACE_BLOCK,
)
HUGGING_FACE_DINOV2: Rules = (  # gamma: LayerScale; weights_in and weights_out: a gated MLP, which is refused
    *HUGGING_FACE_VIT,
    (r"^embeddings\.register_tokens$", "registers"),
    (r"\.layer_scale1\.lambda1$", ".attention.out.gamma"),
    (r"\.layer_scale2\.lambda1$", ".mlp.fc2.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
)
TIMM_BLOCK: Rules = (
    (r"^patch_embed\.proj\.", "embed."),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.attn\.proj\.", ".attention.out."),
    (r"^head\.fc\.", "head."),
)
TIMM_VIT: Rules = (
    *TIMM_BLOCK,
    (r"^cls_token$", "cls"),
    (r"^pos_embed$", "positions"),
    (r"^(reg_token|register_tokens)$", "registers"),
    (r"^norm_pre\.", "pre_norm."),
    (r"^pre_logits\.fc\.", "pooler."),
    (r"\.ls1\.gamma$", ".attention.out.gamma"),
    (r"\.ls2\.gamma$", ".mlp.fc2.gamma"),
)
TIMM_SWIN: Rules = (
    *TIMM_BLOCK,
    (r"^patch_embed\.norm\.", "embed_norm."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"\.attn\.relative_position_bias_table$", ".attention.table"),
)
SWIN_BUFFERS = (r"\.relative_position_index$", r"\.attn_mask$", r"mask_token$")
VIT_MARKERS = ("embeddings.cls_token", "embeddings.position_embeddings")
DINOV2_MARKERS = (*VIT_MARKERS, "encoder.layer.0.layer_scale1.lambda1")
TIMM_MARKERS = ("cls_token", "pos_embed", "patch_embed.proj.weight")

ORIGINS = (  # the first whose markers are all there
    Origin(
        "Hugging Face DINOv2 with registers",
        "vit",
        (*DINOV2_MARKERS, "embeddings.register_tokens"),
        HUGGING_FACE_DINOV2,
        ignored=(r"mask_token$", r"^classifier\."),  # its classifier also reads the mean of the patches
        normalisation=IMAGENET,
        model_type="dinov2_with_registers",
    ),
    Origin(
        "Hugging Face DINOv2",
        "vit",
        DINOV2_MARKERS,
        HUGGING_FACE_DINOV2,
        ignored=(r"mask_token$", r"^classifier\."),
        antialias=False,
        normalisation=IMAGENET,
        model_type="dinov2",
    ),
    Origin(
        "Hugging Face ViT",
        "vit",
        VIT_MARKERS,
        HUGGING_FACE_VIT,
        ignored=(r"mask_token$",),
        epsilon=1e-12,
        antialias=False,
    ),
    Origin(  # the classifier reads the mean of the patches
        "Hugging Face CLIP",
        "vit",
        ("embeddings.class_embedding",),
        (
            (r"^embeddings\.class_embedding$", "cls"),
            (r"^embeddings\.position_embedding\.(weight|embedding)$", "positions"),
            (r"^embeddings\.patch_embedding\.", "embed."),
            (r"^encoder\.layers\.", "blocks."),
            (r"\.self_attn\.q_proj\.", ".attention.query."),
            (r"\.self_attn\.k_proj\.", ".attention.key."),
            (r"\.self_attn\.v_proj\.", ".attention.value."),
            (r"\.self_attn\.out_proj\.", ".attention.out."),
            (r"\.layer_norm(\d)\.", r".norm\1."),
            (r"^pre_layrnorm\.", "pre_norm."),
            (r"^post_layernorm\.", "norm."),
        ),
        ignored=(
            r"^text_model\.",
            r"^(text|visual)_projection\.",
            r"^logit_scale$",
            r"position_ids$",
            r"^classifier\.",
        ),
        epsilon=1e-5,
        gelu="sigmoid",
        antialias=False,
        normalisation=CLIP,
        model_type="clip_vision_model",
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
        normalisation=IMAGENET,
    ),
    Origin(
        "timm CLIP",
        "vit",
        (*TIMM_MARKERS, "norm_pre.weight"),
        TIMM_VIT,
        epsilon=1e-5,
        gelu="sigmoid",
        normalisation=CLIP,
        model_type="clip_vision_model",
    ),
    Origin(  # the names of the authors' own files, too
        "timm DINOv2",
        "vit",
        (*TIMM_MARKERS, "blocks.0.ls1.gamma"),
        TIMM_VIT,
        ignored=(r"mask_token$",),
        normalisation=IMAGENET,
        model_type="dinov2",
    ),
    Origin("timm ViT", "vit", TIMM_MARKERS, TIMM_VIT),
    Origin(  # merging stands at the end of a stage, as in the authors' own code
        "Microsoft Swin",
        "swin",
        ("layers.0.blocks.0.attn.qkv.weight", "layers.0.downsample.norm.weight"),
        (*TIMM_SWIN, (r"^layers\.(\d+)\.downsample\.", r"stages.\1.merging.")),
        ignored=SWIN_BUFFERS,
        epsilon=1e-5,
        normalisation=IMAGENET,
    ),
    Origin(  # merging stands at the beginning of the next stage
        "timm Swin",
        "swin",
        ("layers.0.blocks.0.attn.qkv.weight",),
        (*TIMM_SWIN, *((rf"^layers\.{s + 1}\.downsample\.", f"stages.{s}.merging.") for s in range(8))),
        ignored=SWIN_BUFFERS,
        epsilon=1e-5,
        normalisation=IMAGENET,
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
    Origin(
        "Llama or Qwen2",
        "decoder",
        ("norm.weight", "layers.0.self_attn.q_proj.weight", "layers.0.mlp.gate_proj.weight"),
        (
            (r"^embed_tokens\.weight$", "embedding"),
            (r"^lm_head\.weight$", "output"),
            (r"^layers\.", "blocks."),
            (r"\.self_attn\.([qkvo])_proj\.", r".attention.\1."),
            (r"\.mlp\.(gate|up|down)_proj\.", r".mlp.\1."),
            (r"\.input_layernorm\.", ".norm1."),
            (r"\.post_attention_layernorm\.", ".norm2."),
        ),
        ignored=(r"\.rotary_emb\.inv_freq$",),
    ),
)
BY_NAME = {origin.name: origin for origin in ORIGINS}
WHOLE = r"vit|swin|dinov2|dinov2_with_registers|vision_model|model|module|timm_model|opt\.target"
PREFIXES = rf"^(({WHOLE})\.)+"  # of whole models, stripped
FINAL_RULES: Rules = ((r"(norm\d?)\.weight$", r"\1.scale"), (r"\.weight$", ".kernel"), (r"\.", "/"))
