"""Text on a node: what is said while and after it runs, and what was written into it."""

from server import PromptServer


def say(node, text: str):
    """Show text on the node that runs; its schema must ask for the hidden unique_id."""
    PromptServer.instance.send_progress_text(text, node.hidden.unique_id)


def lines(text: str) -> tuple[str, ...]:
    """The lines of a multiline input that have something in them."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())
