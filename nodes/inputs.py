"""ComfyUI's inputs for settings, and a node's values back.

A node names the fields that it shows, in the order in which workflows store its values: new ones go to the end. All
else comes from the fields. Its `execute` takes plain settings as **given, and so do the nodes that hand many values on
as they are: the schema is the one list of them.
"""

from comfy_api.latest import io

from ..zturbo import settings
from .screen import lines


def of(kind, *fields: str, advanced: bool | None = None) -> list[io.Input]:
    """An input for each of these fields of a dataclass. advanced: folded away until someone asks for them."""
    known = {field.name: (field, setting) for field, setting in settings.each(kind)}
    return [_input(*known[name], advanced) for name in fields]


def sentence(kind, name: str) -> str:
    """The tooltip of a field whose input a node makes itself."""
    return next(setting.sentence for field, setting in settings.each(kind) if field.name == name)


def values(kind, given: dict) -> dict:
    """Field -> value, for the fields whose inputs are among a node's values."""
    return {
        field.name: given[setting.input] if field.type in settings.KINDS else lines(given[setting.input])
        for field, setting in settings.each(kind)
        if setting.input in given
    }


def text_and_picture() -> list[io.Input]:
    """The sockets of what stands beside a MODEL."""
    return [
        io.Clip.Input("clip", tooltip="Z-Image's text encoder."),
        io.Vae.Input("vae", tooltip="Z-Image's VAE (Flux's ae.safetensors)."),
    ]


def sides(tooltip: str) -> list[io.Input]:
    """Width and height of a picture that is drawn."""
    return [
        io.Int.Input(side, default=1024, min=64, max=4096, step=16, tooltip=tooltip) for side in ("width", "height")
    ]


def noise(tooltip: str, anew: bool = False) -> io.Input:
    """The seed of what is drawn. anew: a control beside it offers another one for each run."""
    most = 0xFFFFFFFFFFFFFFFF
    return io.Int.Input("seed", default=0, min=0, max=most, control_after_generate=anew, tooltip=tooltip)


def sampler(tooltip: str) -> io.Input:
    """Core's samplers that suit turbo."""
    names = ["euler", "res_multistep"]
    return io.Combo.Input("sampler", options=names, default=names[0], advanced=True, tooltip=tooltip)


def _input(field, setting, advanced):
    text, default = {"id": setting.input, "tooltip": setting.sentence, "advanced": advanced}, field.default
    if setting.choices:
        return io.Combo.Input(**text, options=list(setting.choices), default=default)
    if field.type is bool:
        return io.Boolean.Input(**text, default=default)
    if field.type is str:
        return io.String.Input(**text, default=default)
    if field.type is int:
        low, high = setting.bounds
        # core's screen puts a control of its own beside every input of this name, unless told
        control = False if setting.input == "seed" else None
        return io.Int.Input(
            **text, default=default, min=low, max=high, step=setting.step, control_after_generate=control
        )
    if field.type is float:
        low, high = map(float, setting.bounds)
        return io.Float.Input(**text, default=default, min=low, max=high, step=setting.step, round=setting.round)
    return io.String.Input(**text, multiline=True, default="\n".join(default))
