"""Pictures and captions for training."""

from comfy_api.latest import io, ui

from ..zturbo import dataset, plots
from ..zturbo.hosts import comfy_paths
from .screen import say
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
                io.Image.Input("images", optional=True, tooltip="Pictures from the graph instead of a folder; all of one size."),
                io.String.Input("captions", multiline=True, default="", optional=True, tooltip="For connected images: one caption a line, in order, or one line for all."),
            ],
            outputs=[TrainingSet.Output(display_name="dataset"), io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, folder, trigger, resolution, images=None, captions="") -> io.NodeOutput:
        if images is None:
            found = dataset.from_folder(comfy_paths.dataset_folder(folder), resolution, trigger)
        else:
            lines = [line.strip() for line in captions.splitlines() if line.strip()]
            arrays = [(image.cpu().clamp(0, 1) * 255).round().byte().numpy() for image in images]  # BHWC, 0..1
            found = dataset.from_arrays(arrays, lines, resolution, trigger)
        say(cls, found.report())
        return io.NodeOutput(found, found.report(), ui=ui.PreviewImage(plots.contact_sheet(found), cls=cls))

    @classmethod
    def fingerprint_inputs(cls, folder, **given):
        """Core gives None for what other nodes will bring."""
        return "" if folder is None or "images" in given else comfy_paths.folder_fingerprint(folder)
