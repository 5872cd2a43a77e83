"""What a packet says of itself: whether decoding can begin with it, and whether it is shown out of turn.

Containers mark keyframes, but not what kind: with intra refresh, as cameras and drones write it, a marked packet is a
picture from which the stream heals within so many packets, and frames decoded from there look right and are not.
"""

from collections.abc import Iterator

REORDERS = frozenset(
    {"h264", "hevc", "vvc", "mpeg4", "mpeg1video", "mpeg2video", "vc1", "wmv3", "rv30", "rv40", "cavs"}
)
"""Codecs whose frames may stand in the file in another order than they are shown."""

TELLS_TYPES = frozenset({"mpeg1video", "mpeg2video", "mpeg4"})
"""Codecs whose packets say in a byte whether they are B-frames; from that follows the order of display."""

INTRA_SLICES = frozenset({2, 4, 7, 9})
RECOVERY_POINT = 6


def packets_to_recover(data: bytes, codec: str, extradata: bytes | None) -> int | None:
    """Return how many packets after this one frames are right if decoding begins here.

    Args:
        data: a packet that the container marks as a keyframe.
        codec: FFmpeg's name of the codec.
        extradata: the stream's, which says how packets are framed.

    Returns:
        0 for a random access point, a number for a recovery point, None where decoding must not begin.
    """
    if codec == "h264":
        return _h264_to_recover(data, extradata)
    if codec == "hevc":
        kinds = [unit[0] >> 1 & 63 for unit in _units(data, extradata, length_at=21)]
        pictures = [kind for kind in kinds if kind < 32]
        return None if pictures and pictures[0] < 16 else 0
    if codec in TELLS_TYPES:
        types = picture_types(data, codec)
        return None if types and types[0] != "I" else 0
    return 0


def is_closed(data: bytes, codec: str, extradata: bytes | None) -> bool:
    """Tell whether the frames after a marked keyframe need none before it, even those that are shown before it."""
    if codec == "h264":
        return any(unit[0] & 31 == 5 for unit in _units(data, extradata, length_at=4))
    if codec == "hevc":
        return any(unit[0] >> 1 & 63 in {19, 20} for unit in _units(data, extradata, length_at=21))
    if codec in {"mpeg1video", "mpeg2video"}:
        group = data.find(b"\0\0\1\xb8")
        return group >= 0 and len(data) > group + 7 and bool(data[group + 7] & 64)
    return codec not in REORDERS


def has_one_layer(extradata: bytes | None) -> bool:
    """Tell whether an HEVC stream says that it has no higher temporal layers."""
    if not extradata:
        return False
    if extradata[0] == 1:
        return len(extradata) > 21 and extradata[21] >> 3 & 7 == 1
    sets = [unit for unit in _units(extradata, None, length_at=21) if unit[0] >> 1 & 63 == 32]
    return bool(sets) and all(len(unit) > 3 and unit[3] >> 1 & 7 == 0 for unit in sets)


def hevc_picture(data: bytes, extradata: bytes | None) -> tuple[bool, int]:
    """Return whether pictures of the same layer refer to the one in a packet of HEVC, and its temporal layer."""
    for unit in _units(data, extradata, length_at=21):
        kind = unit[0] >> 1 & 63
        if kind < 32:
            return kind >= 16 or kind % 2 == 1, (unit[1] & 7) - 1 if len(unit) > 1 else 0
    return True, 0


def picture_types(data: bytes, codec: str) -> str:
    """Return the types of the pictures in a packet of MPEG-1, 2 or 4, such as ``"P"`` or ``"PB"`` (packed)."""
    mark = b"\0\0\1\xb6" if codec == "mpeg4" else b"\0\0\1\0"
    types, at = "", data.find(mark)
    while at >= 0 and at + 5 < len(data):
        types += "IPBS"[data[at + 4] >> 6] if codec == "mpeg4" else "?IPBDXXX"[data[at + 5] >> 3 & 7]
        at = data.find(mark, at + 4)
    return types


def _h264_to_recover(data: bytes, extradata: bytes | None) -> int | None:
    recovery = 0
    for unit in _units(data, extradata, length_at=4):
        kind = unit[0] & 31
        if kind == 5:
            return 0
        if kind == 6:
            found = _recovery_point(unit)
            recovery = recovery if found is None else found
        if kind == 1:
            bits = _Bits(unit[1:12])
            bits.golomb()  # The first macroblock.
            is_intra = bits.golomb() in INTRA_SLICES
            return (recovery if recovery >= 0 else None) if is_intra or recovery else None
    return 0


def _recovery_point(unit: bytes) -> int | None:
    """Return what a recovery point message counts, -1 if the result is only nearly right, None if there is none."""
    message = unit.replace(b"\0\0\3", b"\0\0")
    at = 1
    while at + 2 < len(message):
        kind, at = _variable(message, at)
        size, at = _variable(message, at)
        if kind == RECOVERY_POINT:
            bits = _Bits(message[at : at + 8])
            count = bits.golomb()
            return count if bits.take(1) or not count else -1
        at += size
    return None


def _variable(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    while at < len(message) and message[at] == 255:
        value, at = value + 255, at + 1
    return (value + message[at], at + 1) if at < len(message) else (value, at)


def _units(data: bytes, extradata: bytes | None, *, length_at: int) -> Iterator[bytes]:
    """Split a packet of H.264 or HEVC into the beginnings of its units, whichever way they are framed."""
    if extradata and extradata[0] == 1 and len(extradata) > length_at:
        width, at = (extradata[length_at] & 3) + 1, 0
        while at + width < len(data):
            size = int.from_bytes(data[at : at + width], "big")
            yield data[at + width : at + width + min(size, 1024)] or b"\0"
            at += width + size
        return
    at = data.find(b"\0\0\1")
    while 0 <= at < len(data) - 3:
        following = data.find(b"\0\0\1", at + 3)
        yield data[at + 3 : at + 1027 if following < 0 else min(following, at + 1027)] or b"\0"
        at = following


class _Bits:
    """Bits of a short string, most significant first; zeros after its end."""

    def __init__(self, data: bytes):
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def take(self, count: int) -> int:
        self._left -= count
        return (self._value >> self._left if self._left >= 0 else 0) & ((1 << count) - 1)

    def golomb(self) -> int:
        zeros = 0
        while self._left > 0 and not self.take(1):
            zeros += 1
        return (1 << zeros) - 1 + self.take(zeros)
