"""What a file says of its own length: whether its end is missing."""

from operator import itemgetter
from typing import BinaryIO

from hico.video_io.ebml import CLUSTER, HEADER, SEGMENT, elements
from hico.video_io.mp4 import boxes

_OUTERMOST = {HEADER, SEGMENT, CLUSTER, 0x1C53BB6B, 0x1254C367, 0x1043A770, 0x1941A469, 0xEC}
"""And cues, tags, chapters, attachments and gaps."""


def is_cut_off(file: BinaryIO, end: int, container: str) -> bool:
    """Tell whether the end of a file is missing, where its container tells.

    Args:
        file: the file.
        end: its length in bytes.
        container: FFmpeg's first name of the format.
    """
    check = _CHECKS.get(container)
    return check is not None and check(file, end)


def _mov(file: BinaryIO, end: int) -> bool:
    last = max(boxes(file, end), key=itemgetter(1), default=None)
    # A fragment's tables alone lack what they describe.
    return last is not None and (last[2] > end or last[0] == b"moof")


def _matroska(file: BinaryIO, end: int) -> bool:
    """Compare the end of the last segment with the end of the file; a live recording leaves it open.

    Where files were joined, what is in later segments follows the first one.
    """
    for kind, _, _, past in elements(file, 0, end):
        if kind not in _OUTERMOST or past is None:
            return False
        if past > end:
            return True
    return False


def _avi(file: BinaryIO, end: int) -> bool:
    at = 0
    while at + 12 <= end:
        file.seek(at)
        head = file.read(12)
        if head[:4] != b"RIFF":
            return False
        at += 8 + int.from_bytes(head[4:8], "little") + (head[4] & 1)
    return at > end + 1


def _flv(file: BinaryIO, end: int) -> bool:
    """Look for the length of the last tag, which follows it."""
    file.seek(max(0, end - 4))
    size = int.from_bytes(file.read(4), "big")
    if size > end - 4:
        return True
    file.seek(end - 4 - size)
    head = file.read(4)
    return size > 0 and int.from_bytes(head[1:4], "big") + 11 != size


def _mpegts(file: BinaryIO, end: int) -> bool:
    file.seek(0)
    head = file.read(1024)
    return head[:1] == b"G" and head[188:189] == b"G" and end % 188 > 0


_CHECKS = {"mov": _mov, "matroska": _matroska, "avi": _avi, "flv": _flv, "mpegts": _mpegts}
