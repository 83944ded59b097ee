"""Make a de-distill adapter: draw a set with turbo, extract one from two checkpoints, and check what came out."""

import folder_paths
from comfy_api.latest import io, ui

from ..zturbo import lorafile, pictureset, plots
from ..zturbo.family import Z_IMAGE
from ..zturbo.hosts import comfy_check, comfy_generate, comfy_paths, comfy_weights
from ..zturbo.hosts.comfy_paths import TINY
from . import inputs
from .model import read_adapter
from .save import file_inputs, save
from .screen import face, lines, say
from .types import CATEGORY, CONNECTED, UNWIRED, LoraModel, fingerprint_of, need_one, one_way

PROMPTS = (
    "a photo of a {red|green|blue|white} {car|house|boat|chair}, {morning|evening} light\na portrait of {a woman|a "
    "man|an old man|a child}, {film photo|oil painting|pencil drawing}"
)
SIZES = "1024x1024, 832x1216, 1216x832, 896x1152, 1152x896, 768x768, 512x768, 768x512"


class ZTurboGenerateSet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZTurboGenerateSet",
            display_name="Generate Picture Set",
            category=CATEGORY,
            description=(
                "Draws hundreds or thousands of pictures with turbo at 8 steps, at many sizes, and writes each to "
                "output/zturbo_sets at once, with its caption beside it. The first half of making a de-distill "
                "adapter. Run it again and it goes on where it was; it never draws a picture twice."
            ),
            search_aliases=["generate dataset", "wildcards", "batch generate", "make adapter"],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="Clean turbo, without the de-distill adapter."),
                *inputs.text_and_picture(),
                io.String.Input(
                    "name",
                    default="my_set",
                    tooltip=(
                        "Names the folder in output/zturbo_sets. With the name and settings of a set that is there, it "
                        "goes on."
                    ),
                ),
                io.Int.Input(
                    "count",
                    default=2000,
                    min=1,
                    max=pictureset.MOST,
                    tooltip=(
                        "Pictures in the whole set. May be raised later: what is there stays. Usual for an adapter: "
                        "2000 to 10000."
                    ),
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default=PROMPTS,
                    tooltip=(
                        "One a line; they take turns. {red|blue} picks one of these, __name__ a line of "
                        "input/wildcards/name.txt. The more various, the better the adapter."
                    ),
                ),
                io.String.Input(
                    "prompt_file",
                    default="",
                    tooltip="A text file in ComfyUI's input folder with more prompts, one a line. Empty: none.",
                ),
                io.String.Input(
                    "sizes",
                    default=SIZES,
                    tooltip=(
                        "Width x height in pixels, multiples of 16 from 64 to 4096, with commas between; each picture "
                        "gets one of them by chance. The tiny model: 128x128, 112x144, 144x112, 80x80."
                    ),
                ),
                inputs.noise("Decides choices, sizes and noise: the same seed gives the same set."),
            ],
            outputs=[io.String.Output(display_name="folder"), io.Image.Output(display_name="newest")],
        )

    @classmethod
    def validate_inputs(cls, name, prompts, prompt_file, sizes):
        # None: it comes from another node
        return (
            None in (name, prompts, prompt_file, sizes)
            or comfy_generate.wrong(name.strip(), lines(prompts), prompt_file, sizes)
            or True
        )

    @classmethod
    def execute(cls, model, clip, vae, name, prompts, **given) -> io.NodeOutput:
        plan = comfy_generate.plan(lines(prompts), **given)
        made, drawn = comfy_generate.draw(model, clip, vae, plan, name.strip(), cls.hidden.unique_id)
        text = (
            f"{len(made.there())} pictures in output/{comfy_paths.SETS}/{made.folder.name}, {drawn} of them drawn now."
        )
        say(cls, text)
        sheet = plots.sheet(made.newest(12))
        return io.NodeOutput(f"{comfy_paths.SETS}/{made.folder.name}", sheet, ui=ui.PreviewImage(sheet, cls=cls))

    @classmethod
    def fingerprint_inputs(cls, prompt_file, **_):
        return comfy_generate.changed(prompt_file or "")


class ZTurboExtractAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZTurboExtractAdapter",
            display_name="Extract Adapter",
            category=CATEGORY,
            description=(
                "Makes a de-distill adapter of two models: what the undistilled one has that turbo has not, at a rank "
                "that you choose, saved into models/loras. Says how much of the difference the rank leaves out."
            ),
            search_aliases=["extract lora", "svd", "model difference", "de-turbo"],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "undistilled",
                    tooltip="Z-Image base, a De-Turbo checkpoint, or any de-distilled model of the family.",
                ),
                io.Model.Input("turbo", tooltip="The turbo model that the adapter is for."),
                io.Int.Input(
                    "rank",
                    default=64,
                    min=1,
                    max=1024,
                    tooltip=(
                        "Width of the adapter. Higher is nearer and larger: 5.3 MB a rank on the full model in bf16. "
                        "Usual: 16 to 128."
                    ),
                ),
                *file_inputs("my_adapter", "Of the numbers in the file. bf16: half the size of fp32."),
            ],
            outputs=[
                LoraModel.Output(display_name="adapter"),
                io.String.Output(display_name="path"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def validate_inputs(cls, name):
        return name is None or comfy_paths.bad_lora_name(name) or True  # None: it comes from another node

    @classmethod
    def execute(cls, undistilled, turbo, rank, name, dtype, overwrite) -> io.NodeOutput:
        made = comfy_weights.extracted(undistilled, turbo, rank, cls.hidden.unique_id)
        state = lorafile.LoraState(
            lorafile.state_dict(made.factors, lorafile.DTYPES[dtype]),
            {"modelspec.title": name, "modelspec.architecture": Z_IMAGE.architecture},
        )
        path, text = save(cls, state, state.metadata, name, overwrite, made.report(rank))
        return io.NodeOutput(state, path, text, ui={"text": (text,)})


class ZTurboCheckAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZTurboCheckAdapter",
            display_name="Check Adapter",
            category=CATEGORY,
            description=(
                "Is a de-distill adapter done? With it on, turbo should behave as an undistilled model does: blurred "
                "in 8 steps, whole in many guided ones. Draws the same prompts three ways and says so."
            ),
            search_aliases=["test adapter", "de-distill check"],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="Clean turbo; an adapter of this pack on it is taken away first."),
                *inputs.text_and_picture(),
                io.Combo.Input(
                    "adapter",
                    options=[CONNECTED, TINY, *folder_paths.get_filename_list("loras")],
                    default=CONNECTED,
                    tooltip="A file from models/loras, or the one connected to lora.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default=(
                        "a red fox in fresh snow\na portrait of an old sailor, oil painting\na shop window at night, "
                        "neon signs\na bowl of fruit on a wooden table"
                    ),
                    tooltip="One a line; each is drawn three times. Usual: 4 to 8.",
                ),
                io.Int.Input(
                    "size",
                    default=1024,
                    min=64,
                    max=2048,
                    step=16,
                    tooltip="Pixels, width and height. Usual: 1024; the tiny model: 128.",
                ),
                io.Int.Input("steps", default=24, min=9, max=100, tooltip="Of the long way. Usual: 24 to 50."),
                io.Float.Input(
                    "cfg", default=2.0, min=1.0, max=10.0, step=0.1, tooltip="Guidance of the long way. Usual: 2 to 4."
                ),
                inputs.noise("Picks the noise, the same in all rows."),
                LoraModel.Input("lora", optional=True, tooltip="From Train LoRA or Extract Adapter."),
            ],
            outputs=[
                io.Boolean.Output(display_name="done"),
                io.String.Output(display_name="report"),
                io.Image.Output(display_name="pictures"),
            ],
        )

    @classmethod
    def execute(cls, model, clip, vae, adapter, prompts, lora=None, **given) -> io.NodeOutput:
        need_one(adapter, lora, "an adapter")
        read = read_adapter(adapter) if lora is None else lorafile.of_state(lora, "the connected adapter")
        file = "the adapter" if lora is not None else adapter
        trial = comfy_check.Trial(lines(prompts), **given)
        found = comfy_check.check(model, clip, vae, read, file, trial, cls.hidden.unique_id)
        return io.NodeOutput(found.done, found.text, found.pictures, ui=face(cls, found.text, found.pictures))

    @classmethod
    def validate_inputs(cls, adapter, lora=UNWIRED):
        return one_way(adapter, lora, "an adapter", (TINY,))

    @classmethod
    def fingerprint_inputs(cls, adapter, **_):
        return fingerprint_of(adapter, CONNECTED, TINY)
