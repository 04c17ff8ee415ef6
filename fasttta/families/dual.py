"""Dual encoders that are not CLIP: told apart by what they have, and refused with it."""

from __future__ import annotations

from torch import nn

NEEDED = (
    "needed CLIP's architecture: an image tower (ViT with a class token, or OpenAI's ResNet with "
    "attention pooling), a causal text tower read at its end token, a projection of each into a "
    "joint space, and one logit_scale. Methods for single images replace token embeddings of that "
    "text tower and read that image tower's attention"
)
_IMAGE = ("vision_model", "visual", "vision_encoder", "image_encoder", "visual_encoder",
          "vision_tower", "image_tower")  # fmt: skip
_TEXT = ("text_model", "text", "text_encoder", "text_decoder", "text_tower", "textual",
         "language_model")  # fmt: skip

_TPT = ("image_encoder", "text_encoder", "prompt_learner")  # ClipTestTimeTuning


def refuse_meta(model: nn.Module) -> None:
    """Raises ValueError if a module's tensors hold no values."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    empty = [name for name, x in tensors if x.is_meta]
    if empty:
        raise ValueError(
            f"{type(model).__name__} has {len(empty)} of its {len(tensors)} tensors on the meta "
            f"device, {empty[0]} first: they hold no values; load its weights before: "
            'model.to_empty(device="cpu"), then model.load_state_dict(...)'
        )


def _parts(module: nn.Module) -> set[str]:
    return {*module._modules, *module._parameters, *module._buffers}


def towers(model: nn.Module) -> list[str]:
    """Names of a dual encoder's image and text towers; empty: it is none."""
    parts = _parts(model)
    image = [name for name in _IMAGE if name in parts]
    text = [name for name in _TEXT if name in parts]
    if not text and {"token_embedding", "transformer"} <= parts:
        text = ["token_embedding, transformer"]
    return [*image, *text] if image and text else []


def traits(model: nn.Module) -> list[str]:
    """What a dual encoder has in other ways than CLIP, in words."""
    parts, found = _parts(model), []
    names = [name for name, _ in model.named_parameters()]

    def has(*pieces: str) -> bool:
        return any(all(piece in f".{name}." for piece in pieces) for name in names)

    if "logit_bias" in parts:
        found.append("a logit_bias (a sigmoid loss, as SigLIP has)")
    if "temperature" in parts:
        found.append("a temperature (as ALIGN has)")
    if "logit_scale" not in parts:
        found.append("no logit_scale")
    if has(".word_embeddings."):
        found.append("a text tower with word_embeddings (BERT's, which is not causal)")
    if has(".head.probe.") or has(".attn_pool.") or has(".head.attention."):
        found.append("an image tower pooled by attention, without a class token")
    if has(".trunk."):
        found.append("an image tower of timm (trunk)")
    if has("depthwise_conv") or has("image_model.encoder.blocks"):
        found.append("a convolutional image tower")
    if "text_decoder" in parts:
        found.append("a text_decoder (as CoCa has)")
    if "vision_model" in parts and not {"visual_projection", "text_projection"} <= parts:
        lacks = sorted({"visual_projection", "text_projection"} - parts)
        found.append(f"no {' and no '.join(lacks)}")
    return found


def refusal(model: nn.Module) -> str | None:
    """Why a dual encoder cannot be adapted; None: it is no dual encoder."""
    parts = _parts(model)
    if set(_TPT) <= parts:
        return (
            f"{type(model).__name__} is a wrapper of TPT's line ({', '.join(_TPT)}), which does "
            "not hold the CLIP's token embeddings. Pass the CLIP that it was made of, and of "
            "learner = wrapper.prompt_learner the classes: fasttta.adapt(clip, method, "
            "classes=learner.tokenized_prompts, prompt_length=learner.n_ctx); a prompt that was "
            'learned goes on by adapted.load_tuned({"prompt": learner.ctx})'
        )
    found = towers(model)
    if not found:
        return None
    others = traits(model) or ["none of the parameters of CLIP's towers"]
    return (
        f"{type(model).__name__} is a dual encoder ({', '.join(found)}), not a CLIP: found "
        f"{', '.join(others)}; {NEEDED}. If its modalities meet in a fusion transformer, describe "
        "that: fasttta.adapt(model, spec=fasttta.ModelSpec.detect(model, *inputs))"
    )
