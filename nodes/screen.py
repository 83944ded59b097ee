"""A line of text on a node, while and after it runs."""

from server import PromptServer


def say(node, text: str):
    """Show text on the node that runs; its schema must ask for the hidden unique_id."""
    PromptServer.instance.send_progress_text(text, node.hidden.unique_id)
