"""What the names in other tools' files begin with: a prefix says of which model a layer is, and ends with an underscore where
the dots of a path are underscores too. Those that ComfyUI knows: https://github.com/comfyanonymous/ComfyUI/blob/master/comfy/lora.py
"""

from pathlib import Path

from lightning_oft.formats.errors import AdapterFileError
from lightning_oft.model.adapter_state import AdapterState

KOHYA = "oft_unet_"  # of networks/oft.py alone
DIFFUSERS = "transformer."  # ComfyUI puts weights of such names together where its own model has one in their place
_OF_CLASS = {
    "UNet2DConditionModel": "lora_unet_",
    **dict.fromkeys(("AuraFlow", "Flux", "PixArt", "QwenImage", "SD3"), DIFFUSERS),
}
"""By diffusers' class, without its `Transformer2DModel`."""
_KNOWN = (KOHYA, "lora_unet_", "lora_transformer_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_te_", "lycoris_",
          DIFFUSERS, "unet.", "prior.", "text_encoder.", "text_encoder_2.", "text_encoder_3.", "diffusion_model.")  # fmt: skip


def prefix_of_class(name: str) -> str:
    """The prefix for a model of a class. Raises AdapterFileError where it is not known."""
    known = _OF_CLASS.get(name.removesuffix("Transformer2DModel"))
    if known is None:
        what = f"nothing says what the names of a {name or 'model of an unknown class'} begin with in this format"
        raise AdapterFileError(
            f"{what}: give it, such as 'lora_te_text_model_', 'lycoris_' or 'diffusion_model.' (--prefix)"
        )
    return known


def prefix_of(state: AdapterState) -> str:
    """The prefix that an adapter is written with: what was asked for, what its file had, or that of the model's class.
    Raises AdapterFileError."""
    given = state.extra.get("prefix")
    return checked(given) if given else prefix_of_class(state.base.class_name if state.base is not None else "")


def checked(prefix: str) -> str:
    """The prefix. Raises AdapterFileError where it would run into the name."""
    if prefix[-1:] not in ("_", "."):
        raise AdapterFileError(f"prefix={prefix!r}: must end with '_' or '.', as in 'lora_unet_' or 'transformer.'")
    return prefix


def placed(prefix: str, name: str) -> str:
    """A layer's name in a file."""
    return prefix + (name.replace(".", "_") if prefix.endswith("_") else name)


def split_prefix(file: Path, name: str) -> tuple[str, str]:
    """The prefix of a layer's name in a file, and the rest. Raises AdapterFileError where it has none that is known."""
    prefix = next((one for one in _KNOWN if name.startswith(one) and len(name) > len(one)), None)
    if prefix is None:
        raise AdapterFileError(f"{file}: {name} begins with none of {', '.join(_KNOWN)}; rename its keys")
    return prefix, name.removeprefix(prefix)
