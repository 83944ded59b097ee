"""Pictures and captions for training."""

from comfy_api.latest import io, ui

from ..zturbo import dataset, plots
from ..zturbo.errors import DatasetError
from ..zturbo.hosts import comfy_paths
from ..zturbo.recipe import MASKS, Data
from . import screen
from .types import CATEGORY, TrainingSet


class ZTurboImageDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZTurboImageDataset",
            display_name="Image Dataset",
            category=CATEGORY,
            description="Pictures with captions to train on: a folder inside ComfyUI's input folder, or pictures from the graph. Shows a contact sheet.",
            search_aliases=["training images", "dataset", "captions"],
            hidden=[io.Hidden.unique_id],
            is_input_list=True,  # folders come out of core's loader as lists: one dataset of all of them
            inputs=[
                io.String.Input(
                    "folder",
                    default="my_pictures",
                    tooltip="A folder inside ComfyUI's input (or output) folder, with 10 to 30 pictures and a .txt caption of the same name beside each. bundled: smiley is the demo's. Not used when images are connected.",
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    tooltip="A made-up word for what you teach, for example zvk_cat. It stands where a caption says [trigger], else in front. Without captions it is the whole caption.",
                ),
                io.Int.Input(
                    "resolution",
                    default=1024,
                    min=64,
                    max=2048,
                    step=16,
                    tooltip="Pixels. Each picture is trained at this area (side x side) in its own aspect ratio, never enlarged. Usual: 512 to 1024; memory and time grow with its square.",
                ),
                io.String.Input(
                    "more_resolutions",
                    default="",
                    tooltip="Pixels, with commas between (512, 768): each picture is trained at these areas too, where it is large enough. Empty: only at resolution.",
                ),
                io.Float.Input(
                    "caption_dropout",
                    default=0.05,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How often a picture's caption shrinks to the trigger word, 0 to 1: ties what is learnt to that word. Usual: 0.05.",
                ),
                io.Boolean.Input(
                    "shuffle_tags",
                    default=False,
                    tooltip="For captions that are lists of tags with commas between: show them in changing order.",
                ),
                io.Int.Input(
                    "keep_tags",
                    default=1,
                    min=0,
                    max=50,
                    tooltip="First tags that stay in front when tags are shuffled; a trigger word that was put in front is one of them.",
                ),
                io.Boolean.Input(
                    "flip",
                    default=False,
                    tooltip="Show pictures mirrored too. Not for faces, letters, or anything with a left and a right.",
                ),
                io.Boolean.Input(
                    "upscale",
                    default=False,
                    tooltip="Enlarge pictures that are smaller than resolution. Off: they are trained at their own size.",
                ),
                io.Combo.Input(
                    "masks",
                    options=list(MASKS),
                    default="files",
                    tooltip="Which part of a picture counts. files: cat.mask.png or cat-masklabel.png beside cat.png, white where it counts. files and alpha: also the transparency of pictures that have one. off: none.",
                ),
                io.Float.Input(
                    "outside",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much the loss counts outside a mask, against 1 inside. Usual: 0.1; at 0 the surroundings may become anything.",
                ),
                io.String.Input(
                    "regularisation_folder",
                    default="",
                    tooltip="A folder inside ComfyUI's input folder with pictures of the kind at large (cats, not your cat) and captions without the trigger word, so that the kind is not forgotten. Empty: none.",
                ),
                io.Float.Input(
                    "regularisation_weight",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Factor on the loss of regularisation pictures, 0 to 10. Usual: 1.",
                ),
                io.Float.Input(
                    "validation",
                    default=0.0,
                    min=0.0,
                    max=0.5,
                    step=0.05,
                    tooltip="Share of the pictures that is not trained on but only looked at: when their loss rises again, the LoRA has begun to learn by heart. 0: none. Usual: 0.1 with 20 pictures or more.",
                ),
                io.Int.Input(
                    "validation_every",
                    default=100,
                    min=1,
                    max=100000,
                    tooltip="Steps between two such looks; each takes as long as about ten steps.",
                ),
                io.Boolean.Input(
                    "cache",
                    default=True,
                    tooltip="Keep encoded pictures and captions in output/zturbo/.cache, so that the next run with them starts at once. The run's log says how much room it takes.",
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="Pictures from the graph instead of a folder: a batch, or a list of any sizes, as core's Load Image-Text Dataset from Folder gives.",
                ),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="For connected images: one caption a line, in order, or one line for all; or a list with a text for each.",
                ),
            ],
            outputs=[TrainingSet.Output(display_name="dataset"), io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, images=None, captions=(), **given) -> io.NodeOutput:
        if several := next((name for name, values in given.items() if len(values) > 1), ""):
            raise DatasetError(
                f"{len(given[several])} values came in for {several}; one dataset has one. Lists are for images and captions."
            )
        return cls.make(images, list(captions), **{name: values[0] for name, values in given.items()})

    @classmethod
    def make(
        cls, images, captions, folder, trigger, resolution, more_resolutions, caption_dropout, shuffle_tags, keep_tags, flip, upscale, masks, outside,
        regularisation_folder, regularisation_weight, validation, validation_every, cache,
    ) -> io.NodeOutput:  # fmt: skip
        """images: a list of batches [B, H, W, C]; captions: a list of texts, where a single one has a caption a line."""
        options = Data(
            caption_dropout,
            shuffle_tags,
            keep_tags,
            flip,
            upscale,
            masks,
            outside,
            regularisation_weight,
            validation,
            validation_every,
            cache,
        )
        sides = (resolution, *dataset.read_sides(more_resolutions))
        if images is None:
            regularisation = (
                comfy_paths.dataset_folder(regularisation_folder) if regularisation_folder.strip() else None
            )
            found = dataset.from_folder(comfy_paths.dataset_folder(folder), sides, trigger, options, regularisation)
        else:
            # BHWC, 0..1
            arrays = [(image.cpu().clamp(0, 1) * 255).round().byte().numpy() for batch in images for image in batch]
            texts = captions if len(captions) > 1 or len(arrays) == 1 else screen.lines("".join(captions))
            found = dataset.from_arrays(arrays, list(texts), sides, trigger, options)
        report = found.report()
        screen.say(cls, report)
        return io.NodeOutput(found, report, ui=ui.PreviewImage(plots.contact_sheet(found), cls=cls))

    @classmethod
    def fingerprint_inputs(cls, folder, regularisation_folder, **given):
        """Core gives None for what other nodes will bring."""
        return (
            ""
            if "images" in given
            else str([comfy_paths.folder_fingerprint(name) for name in (*folder, *regularisation_folder) if name])
        )
