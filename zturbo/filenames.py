"""Names that every system takes for a file or folder."""

import re
import unicodedata

MARKS = ("Mn", "Mc")  # vowels and accents of some writings are signs of their own
# what Windows takes for a device, with any ending
DEVICES = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])[ .]*(\..*)?", re.IGNORECASE)


def file_name(name: str) -> bool:
    """True for one plain path component that every system accepts, with an ending of 20 characters behind it."""
    plain = (
        bool(name)
        and len(name) <= 100
        and name[0].isalnum()
        and name[-1] not in ". "
        and all(c.isalnum() or c in " ._-" or unicodedata.category(c) in MARKS for c in name)
    )
    return plain and len(name.encode()) <= 200 and not DEVICES.fullmatch(name)


def bad_name(name: str) -> str:
    """What is wrong with a name that cannot be a file name, or nothing."""
    return (
        ""
        if file_name(name)
        else f"The name {name!r} cannot be a file name. Use up to 100 letters, digits, spaces and . _ - only, "
        "start with a letter or digit, and none of Windows' devices (con, nul, com1 …)."
    )
