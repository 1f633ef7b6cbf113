"""Text files from users, such as class names and lists of files."""

from __future__ import annotations

from pathlib import Path

from utils.errors import UserError

_BYTE_ORDER_MARKS = ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"), (b"\xef\xbb\xbf", "utf-8-sig"))


def read_lines(path: str | Path, field: str) -> list[tuple[int, str]]:
    """Return (line number, text) of the lines of a text file that are not empty and not comments (``#``).

    Spaces around a line and a byte order mark are removed. Bytes that are not UTF-8 become surrogates, so file names
    keep their bytes. If the file cannot be read, the UserError names the argument ``field``.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{field}: there is no file {path}") from None
    except OSError as error:
        raise UserError(f"{field}: {path} cannot be read: {error.strerror or error}") from None
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "strict")
    except UnicodeDecodeError as error:
        raise UserError(f"{field}: {path} cannot be read as text ({error.reason}); save it as UTF-8") from None
    if "\0" in text:  # such as UTF-16 without a byte order mark
        raise UserError(f"{field}: {path} is not UTF-8 text (it contains a byte 0); save it as UTF-8")
    lines = ((number, line.strip().lstrip("\ufeff")) for number, line in enumerate(text.splitlines(), 1))
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def without_quotes(text: str) -> str:
    """Return the text without spaces and quotes around it."""
    text = text.strip()
    return text[1:-1].strip() if len(text) > 2 and text[0] == text[-1] in "\"'" else text


def printable(text: str) -> str:
    """Return the text with bytes of file names that are not UTF-8 as %XX, so that it can be written as UTF-8."""
    return "".join(f"%{ord(c) - 0xDC00:02X}" if "\udc80" <= c <= "\udcff" else c for c in text)
