"""Errors that reach the user: what was given, what was expected, what to do."""

LONGEST = 1500  # characters of a sentence


class ZTurboError(Exception):
    """A sentence for the person at the screen. Raised instead of a traceback that they could not act on."""

    def __init__(self, sentence: str):
        super().__init__(readable(sentence))


def readable(sentence: str) -> str:
    """One printable line of bearable length: what it quotes comes from files and may be anything."""
    line = sentence if sentence.isprintable() else "".join(map(_printable, sentence))
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 400]} … {line[-390:]}"


def _printable(letter: str) -> str:
    if letter.isprintable():
        return letter
    return " " if letter.isspace() else letter.encode("unicode_escape").decode()


class DatasetError(ZTurboError):
    """The pictures or captions cannot be trained on."""


class CaptionChangedError(DatasetError):
    """Somebody else has written this caption meanwhile. now: what it is."""

    def __init__(self, sentence: str, now: str):
        super().__init__(sentence)
        self.now = now


class CacheError(ZTurboError):
    """An encoded picture or caption that was there is not any more."""


class LoraFileError(ZTurboError):
    """A LoRA or adapter file cannot be read, or does not fit the model."""


class CheckpointError(ZTurboError):
    """A checkpoint cannot be written or read, or is of another run."""


class ModelError(ZTurboError):
    """The model is not what the node needs."""


class TrainingError(ZTurboError):
    """Training had to end. What was learnt so far has been saved where the message says."""


class LossError(TrainingError):
    """The loss is no number any more, or many times what it was. loss: its value."""

    def __init__(self, sentence: str, loss: float):
        super().__init__(sentence)
        self.loss = loss
