"""Z-Image Turbo LoRA: train a LoRA on a step-distilled Z-Image inside ComfyUI, and keep its eight steps."""

WEB_DIRECTORY = "./js"


async def comfy_entrypoint():
    """ComfyUI's V3 entry point. Imports happen here, so that importing the folder itself needs no ComfyUI."""
    from .nodes import extension

    return extension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
