"""Text of models and files as a terminal may show it: letters, not commands to the terminal."""

import re

# C0 but tab and line feed, DEL, C1; overrides of the writing direction; what UTF-8 cannot hold
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text without carriage returns, U+FFFD in place of every other control character."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r", ""))


def escaped(text: str) -> str:
    r"""JSON with the control characters that json.dumps leaves in as \u escapes."""
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
