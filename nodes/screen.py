"""Text on a node: what is said while and after it runs, and what was written into it."""

from comfy_api.latest import ui
from server import PromptServer


def say(node, text: str):
    """Show text on the node that runs; its schema must ask for the hidden unique_id."""
    PromptServer.instance.send_progress_text(text, node.hidden.unique_id)


def face(node, text: str, pictures) -> dict:
    """What a node shows once it has run: a text, which is said at once, and an IMAGE."""
    say(node, text)
    return {"text": (text,), **ui.PreviewImage(pictures, cls=node).as_dict()}


def lines(text: str) -> tuple[str, ...]:
    """The lines of a multiline input that have something in them."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())
