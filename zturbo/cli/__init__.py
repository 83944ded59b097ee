"""The command line: a run without a graph, and what LoRA files hold."""

import argparse
import io
import json
import sys

from ..errors import ZTurboError
from . import files, importing, sampling, screen, training

DESCRIPTION = """Train LoRAs on Z-Image-Turbo and keep its 8 steps, without a graph.

A recipe is a TOML file: the recipe.toml in the folder of any run, made here or in ComfyUI. Where its section [inputs]
says nothing, give the model, the adapter and the pictures as options."""
EXAMPLES = """examples:
  python -m zturbo plan recipe.toml
  python -m zturbo train recipe.toml --model z_image_turbo_bf16.safetensors --text-encoder qwen_3_4b.safetensors \\
      --vae ae.safetensors --adapter zimage_turbo_training_adapter_v2.safetensors --pictures my_pictures \
--trigger zvk_me
  python -m zturbo train --model tiny --adapter tiny --pictures models/tiny/smiley --trigger zsmile --set steps=200
  python -m zturbo resume zturbo_runs/my_lora
  torchrun --nproc-per-node 2 -m zturbo train recipe.toml --set batch_size=2     two cards, one LoRA
  python -m zturbo sample --model tiny --lora zturbo_runs/my_lora/lora.safetensors \
--prompt "a large zsmile on a blue background" --size 128x128
  python -m zturbo inspect my_lora.safetensors
  python -m zturbo convert kohya.safetensors mine.safetensors --rank 16
  python -m zturbo import train_lora.yaml --output recipe.toml

Ctrl-C stops a run and keeps what it has learnt; a second Ctrl-C ends it at once, \
and resume goes on from its last checkpoint.

On many cards the batch is shared: see "Two cards" in README.md. Each process needs the package accelerate.

exit codes: 0 done, 1 something was wrong and a sentence says what, 2 the command was not understood, \
3 stopped and kept (0 on many cards, whose launchers take anything else for a failure), 130 cancelled."""


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults where there are some."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, [], False) else super()._get_help_string(action)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m zturbo",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for room in (training, sampling, files, importing):
        room.add(commands)
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a console that has not every letter
    try:
        return args.run(args)
    except ZTurboError as error:
        if args.json:
            print(json.dumps({"error": str(error)}))
        else:
            print(f"zturbo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as behind `| head`
        screen.unread()
        return 0


def command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    """A command with what all have."""
    parser = commands.add_parser(name, help=text, description=text, formatter_class=Defaults)
    parser.add_argument("--json", action="store_true", help="a JSON object a line, for programs")
    parser.set_defaults(run=run)
    return parser
