"""What tensors are called: in official files, and here.

The modules of this repository carry the official names inside, so that a layout is no more than a table of prefixes:
what tensors are called in the files -> what they are called here. To read, take the first line whose left side begins
the name; to write, the first whose right side does. So longer prefixes come first. None: known, not needed, passed
over. A star: whatever stands in front. By the fifth line of LLAVA,

    model.layers.3.mlp.up_proj.weight  is  language.layers.3.mlp.up_proj.weight

in a Llava: `model.language.layers[3].mlp.up_proj.weight`.
"""

Layout = tuple[tuple[str, str | None], ...]

CLIP: Layout = (
    ("vision_model.encoder.layers.", "layers."),
    ("vision_model.", ""),
    ("text_model.", None),  # the other half of CLIP
    ("text_projection.", None),
    ("visual_projection.", None),
    ("logit_scale", None),
    ("encoder.layers.", "layers."),  # a bare tower as newer transformers may write it
    ("", ""),
)
LLAMA: Layout = (("lm_head.", "lm_head."), ("model.", ""))

# LLaVA v1.5 as its authors have it, which is also our own
TOWER = "model.vision_tower.vision_tower.vision_model."  # the official code's wrapper and what it wraps share a name
LLAVA: Layout = (
    (f"{TOWER}encoder.layers.", "vision.layers."),
    (TOWER, "vision."),
    ("model.mm_projector.", "projector."),
    ("lm_head.", "language.lm_head."),
    ("model.", "language."),
)

# LLaVA as transformers has it: llava-hf, and what newer versions write, without "vision_model." or with another order
_HF: Layout = (
    ("vision_tower.vision_model.encoder.layers.", "vision.layers."),
    ("vision_tower.vision_model.", "vision."),
    ("vision_tower.encoder.layers.", "vision.layers."),
    ("vision_tower.", "vision."),
    ("multi_modal_projector.linear_1.", "projector.0."),
    ("multi_modal_projector.linear_2.", "projector.2."),
    ("language_model.lm_head.", "language.lm_head."),
    ("language_model.model.", "language."),
    ("language_model.", "language."),
)
LLAVA_HF: Layout = (*_HF, ("lm_head.", "language.lm_head."), *((f"model.{theirs}", ours) for theirs, ours in _HF))

# a projector alone: mm_projector.bin of stage 1, non_lora_trainables.bin of a LoRA run
PROJECTOR: Layout = (("*mm_projector.", ""),)
PROJECTOR_WITH_START_END: Layout = (*PROJECTOR, ("*embed_tokens.weight", None))  # v0, v1: see trained_start_end

# tables that old versions stored and every model computes
PASSED_OVER = (".self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "embeddings.position_ids")


def ours(name: str, layout: Layout) -> str | None:
    """What a tensor of a file is called here; None where it is passed over. Unknown names become "? name", which no
    parameter is called, so that they are reported."""
    if name.endswith(PASSED_OVER):
        return None
    for theirs, mine in layout:
        prefix = theirs.removeprefix("*")
        start = name.find(prefix) if theirs.startswith("*") else 0
        if start >= 0 and name.startswith(prefix, start):
            return None if mine is None else mine + name[start + len(prefix) :]
    return f"? {name}"


def theirs(name: str, layout: Layout) -> str:
    """What a tensor of a module is called in a file."""
    official, mine = next((t, o) for t, o in layout if o is not None and name.startswith(o))
    return official.replace("*", "model.") + name.removeprefix(mine)
