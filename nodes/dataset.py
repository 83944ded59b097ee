"""Pictures and captions for training."""

from comfy_api.latest import io, ui

from ..zturbo import buckets, dataset, plots
from ..zturbo.errors import DatasetError
from ..zturbo.hosts import comfy_paths
from ..zturbo.recipe import Data
from . import inputs, screen
from .types import CATEGORY, TrainingSet


class ZTurboImageDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZTurboImageDataset",
            display_name="Image Dataset",
            category=CATEGORY,
            description=(
                "Pictures with captions to train on: a folder inside ComfyUI's input folder, or pictures from the "
                "graph. Shows a contact sheet."
            ),
            search_aliases=["training images", "dataset", "captions"],
            hidden=[io.Hidden.unique_id],
            is_input_list=True,  # folders come out of core's loader as lists: one dataset of all of them
            inputs=[
                io.String.Input(
                    "folder",
                    default="my_pictures",
                    tooltip=(
                        "A folder inside ComfyUI's input (or output) folder, with 10 to 30 pictures and a .txt caption "
                        "of the same name beside each. bundled: smiley is the demo's. Not used when images are "
                        "connected."
                    ),
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    tooltip=(
                        "A made-up word for what you teach, for example zvk_cat. It stands where a caption says "
                        "[trigger], else in front. Without captions it is the whole caption."
                    ),
                ),
                io.Int.Input(
                    "resolution",
                    default=1024,
                    min=64,
                    max=2048,
                    step=16,
                    tooltip=(
                        "Pixels. Each picture is trained at this area (side x side) in its own aspect ratio, never "
                        "enlarged. Usual: 512 to 1024; memory and time grow with its square."
                    ),
                ),
                io.String.Input(
                    "more_resolutions",
                    default="",
                    advanced=True,
                    tooltip=(
                        "Pixels, with commas between (512, 768): each picture is trained at these areas too, where it "
                        "is large enough. Empty: only at resolution."
                    ),
                ),
                *inputs.of(Data, "caption_dropout", "shuffle_tags", "keep_tags", "flip", advanced=True),
                *inputs.of(Data, "upscale", "masks", "outside", advanced=True),
                io.String.Input(
                    "regularisation_folder",
                    default="",
                    advanced=True,
                    tooltip=(
                        "A folder inside ComfyUI's input folder with pictures of the kind at large (cats, not your "
                        "cat) and captions without the trigger word, so that the kind is not forgotten. Empty: none."
                    ),
                ),
                *inputs.of(Data, "regularisation_weight", "validation", "validation_every", "cache", advanced=True),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip=(
                        "Pictures from the graph instead of a folder: a batch, or a list of any sizes, as core's Load "
                        "Image-Text (from Folder) gives."
                    ),
                ),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "For connected images: one caption a line, in order, or one line for all; or a list with a "
                        "text for each."
                    ),
                ),
            ],
            outputs=[TrainingSet.Output(display_name="dataset"), io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, images=None, captions=(), **given) -> io.NodeOutput:
        if several := next((name for name, values in given.items() if len(values) > 1), ""):
            raise DatasetError(
                f"{len(given[several])} values came in for {several}; one dataset has one. Lists are for images and "
                "captions."
            )
        return cls.make(images, list(captions), **{name: values[0] for name, values in given.items()})

    @classmethod
    def make(
        cls, images, captions, trigger, resolution, more_resolutions, regularisation_folder, **given
    ) -> io.NodeOutput:
        """images: a list of batches [B, H, W, C]; captions: a list of texts; a single one has a caption a line."""
        options = Data(**inputs.values(Data, given))
        sides = (resolution, *buckets.read_sides(more_resolutions))
        if images is None:
            regularisation = (
                comfy_paths.dataset_folder(regularisation_folder) if regularisation_folder.strip() else None
            )
            found = dataset.from_folder(
                comfy_paths.dataset_folder(given["folder"]),
                sides,
                trigger,
                options,
                regularisation,
                cache=comfy_paths.runs().cache,
            )
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
