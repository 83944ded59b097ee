"""A node pack without nodes: ComfyUI imports it before anything is loaded, and core then works as on a card."""

import logging
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "standin"))
import emulation

CARD = emulation.card(os.environ["ZTURBO_CARD_KIND"])
CARD.__enter__()
logging.info("Core works as on a %s card.", os.environ["ZTURBO_CARD_KIND"])
NODE_CLASS_MAPPINGS: dict = {}
