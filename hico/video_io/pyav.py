"""Decode with PyAV: seek where that is cheaper, skip what no sample needs, and decode between keyframes in parallel.

Three things are left out of the decoding, none of which changes a pixel: the rest of a GOP, where the next sample lies
behind a later keyframe; frames that no other frame refers to, in the codecs that say so reliably; and the frames after
the last sample of a run, by draining the decoder as soon as that sample's packet is in.
"""

import threading
from collections.abc import Iterator
from contextlib import closing
from itertools import chain

import av
import av.error

from hico.video_io.base import Reader, Sink
from hico.video_io.bitstream import has_one_layer, hevc_picture, packets_to_recover
from hico.video_io.index import Opened, VideoIndex, best_video_stream, set_threads
from hico.video_io.packets import BROKEN_OFF, NEW_HEADER
from hico.video_io.resize import ExactResizer
from hico.video_io.runs import Run, plan_runs
from hico.video_io.source import TOO_SLOW, Source, VideoError

SKIPS_UNREFERENCED = frozenset({"h264", "mpeg4", "mpeg2video", "mpeg1video"})
"""Codecs whose B-frames that nothing refers to are marked for certain, so that FFmpeg may skip them. In HEVC pictures
of higher temporal layers, which phones write, may refer to what is marked; it is left out where there is one layer."""

PACKETS_PER_REFERENCE = 4
"""Recovery is counted in frames that others refer to. Where they are rarer, the decoder withholds frames, and samples
are decoded again from farther back."""


class PyAVReader(Reader):
    """The default reader: decodes everything that FFmpeg does, and goes on after damage."""

    def decode(self, source, index, wanted, sink, *, resizer, num_threads, max_ahead):
        starts = [start.position for start in index.starts]
        runs = plan_runs(wanted, starts, num_threads=num_threads)
        longest = max(run.last - run.first for run in runs)
        # Threads beyond the first work on later runs. Where a later run's samples would not fit into the sink, the
        # threads help within the run instead.
        num_workers = min(num_threads, len(runs), max(1, max_ahead // longest))
        work = _Work(runs, sink)
        workers = [
            _Worker(source, index, wanted, sink, resizer=resizer(), num_threads=num_threads // num_workers)
            for _ in range(num_workers)
        ]
        name = f"decode {source.name}"
        threads = [threading.Thread(target=work.share, args=(each,), name=name, daemon=True) for each in workers[1:]]
        for thread in threads:
            thread.start()
        work.share(workers[0])
        for thread in threads:
            thread.join()
        if work.error is not None:
            raise work.error
        return sum(worker.num_lost for worker in workers)


class _Work:
    """Runs, handed out in order, until they are done or one fails."""

    def __init__(self, runs: list[Run], sink: Sink):
        self._runs = iter(runs)
        self._sink = sink
        self._lock = threading.Lock()
        self.error: BaseException | None = None

    def share(self, worker: "_Worker") -> None:
        try:
            while (run := self._next()) is not None:
                worker.decode(run)
        except BaseException as error:  # Raised again by the caller, whichever thread it happened in.
            self.error = self.error or error
            self._sink.fail(error)
        finally:
            worker.close()

    def _next(self) -> Run | None:
        with self._lock:
            return next(self._runs, None) if self.error is None else None


class _Worker:
    """Decodes runs and puts their samples away, one stand-in for each that is lost."""

    def __init__(
        self,
        source: Source,
        index: VideoIndex,
        wanted: list[int],
        sink: Sink,
        *,
        resizer: ExactResizer,
        num_threads: int,
    ):
        self._source, self._index, self._wanted, self._sink = source, index, wanted, sink
        self._resizer, self._num_threads = resizer, num_threads
        self._decoder: _Decoder | None = None
        self.num_lost = 0

    def decode(self, run: Run) -> None:
        if self._decoder is None:
            opened = self._index.take_opened()  # The first worker's, who decodes the first run.
            self._decoder = _Decoder(
                self._source, self._index, self._num_threads, seeks=self._index.can_seek, opened=opened
            )
        done = self._decode_quickly(run)
        if done < run.last:
            self._decode_carefully(Run(run.start, done, run.last))

    def close(self) -> None:
        if self._decoder is not None:
            self._decoder.close()

    def _decode_quickly(self, run: Run) -> int:
        """Decode nothing that is not needed; returns the first sample that did not come out."""
        wanted = self._wanted[run.first : run.last]
        done = 0
        for position, frame in self._decoder.frames(run.start, only=wanted):
            if position > wanted[done]:
                break
            if position == wanted[done]:
                self._finish(run.first + done, position, frame)
                done += 1
                if done == len(wanted):
                    break
        return run.first + done

    def _decode_carefully(self, run: Run) -> None:
        """Decode every frame; the nearest good one stands in for a lost sample."""
        previous: tuple[int, av.VideoFrame] | None = None
        here = run.first
        # On one thread: with several, FFmpeg gives the frames after a broken one each other's numbers.
        with closing(_Decoder(self._source, self._index, 1, seeks=self._decoder.seeks)) as decoder:
            for position, frame in decoder.frames(run.start):
                while here < run.last and self._wanted[here] <= position:
                    if self._wanted[here] < position and previous is None:
                        previous = self._last_before(run.start)
                    self._finish(here, *_nearest(self._wanted[here], previous, (position, frame)))
                    here += 1
                previous = (position, frame)
                if here == run.last:
                    return
        previous = previous or self._last_before(run.start)
        if previous is None:
            begin = self._index.seconds[self._wanted[run.first]]
            raise VideoError(
                f"{self._source.name}: no frame could be decoded from {begin:.2f} s on; "
                "the file is damaged. Fetch it again, or set end to an earlier time"
            )
        for position in range(here, run.last):
            self._finish(position, *previous)

    def _last_before(self, start: int) -> tuple[int, av.VideoFrame] | None:
        """Return the last good frame before a start, from as far back as it takes."""
        limit = self._index.starts[start].position
        with closing(_Decoder(self._source, self._index, 1, seeks=self._decoder.seeks)) as decoder:
            for earlier in reversed(range(start)):
                found = None
                for position, frame in decoder.frames(earlier):
                    if position >= limit:
                        break
                    found = (position, frame)
                if found is not None:
                    return found
        return None

    def _finish(self, here: int, position: int, frame: av.VideoFrame) -> None:
        self.num_lost += position != self._wanted[here]
        self._sink.put(here, self._resizer(frame), float(self._index.seconds[position]))


class _Decoder:
    """One open container.

    Attributes:
        seeks: False once a seek has led to other packets than the index lists; packets are then read from the start.
    """

    def __init__(
        self, source: Source, index: VideoIndex, num_threads: int, *, seeks: bool, opened: Opened | None = None
    ):
        self._source, self._index, self._num_threads = source, index, num_threads
        self._packets, self._timeline = index.packets, index.timeline
        self.seeks, self._opened = seeks, opened
        self._container: av.container.InputContainer | None = None
        if opened is None:
            self._open()
        else:
            self._start(opened.container, opened.num_packets)

    def close(self) -> None:
        self._container.close()
        del self._demuxed, self._stream  # Or the decoder and its pictures would wait for Python's cyclic collector.

    def frames(self, start: int, *, only: list[int] | None = None) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield good frames with their positions, in display order.

        Args:
            start: number of the start to decode from.
            only: positions of the frames that matter. Frames that no other needs may be missing, and decoding ends
                with the last one of these, or at the first error. If omitted, every good frame up to the end.
        """
        is_careful = only is None
        needed = None if is_careful or self._timeline.is_counted else set(self._timeline.numbers[only].tolist())
        is_needed = frozenset(needed or ())
        packets, frames = self._begin(start, is_careful=is_careful, needed=needed)
        context = self._stream.codec_context
        skips = needed is not None and context.name in SKIPS_UNREFERENCED
        extradata = context.extradata
        drops = needed is not None and context.name == "hevc" and has_one_layer(extradata)
        place = _Counter(self._index, start) if self._timeline.is_counted else self._timeline.places.item
        earliest = self._index.starts[start].position
        context.skip_frame = "DEFAULT"
        is_over = False
        while True:
            if needed is not None and not needed and not is_over:
                is_over, frames = True, frames + (self._decode(None) or [])
            for frame in frames:
                position = -1 if frame.pts is None else place(frame.pts)
                if position >= earliest and not frame.is_corrupt:
                    yield position, frame
            if is_over:
                return
            number, packet = next(packets, (None, None))
            is_over = packet is None
            if packet is not None:
                packet.pts, packet.dts = number, None
                if drops:
                    is_referred_to, layer = hevc_picture(bytes(packet), extradata)
                    if layer:
                        return  # The header said otherwise.
                    if not is_referred_to and number not in is_needed:
                        frames = []
                        continue
                if skips:
                    context.skip_frame = "DEFAULT" if number in is_needed else "NONREF"
                if needed is not None:
                    needed.discard(number)
            frames = self._decode(packet)
            if frames is None and not is_careful:
                return
            frames = frames or []

    def _begin(
        self, start: int, *, is_careful: bool, needed: set[int] | None
    ) -> tuple[Iterator[tuple[int, av.Packet]], list[av.VideoFrame]]:
        """Return numbered packets from a start on, and the frames that are out already.

        The first frames of the video may have been decoded for the index; packets that the decoder has are then taken
        out of ``needed``.
        """
        opened, self._opened = self._opened, None
        is_begun = opened is not None and opened.num_packets > 0
        if not is_begun or is_careful or self._index.starts[start].packet:
            return self._packets_from(start, is_careful=is_careful), []
        if needed is not None:
            needed.difference_update(range(opened.num_packets))
        return self._numbered(opened.num_packets), list(opened.frames)

    def _decode(self, packet: av.Packet | None) -> list[av.VideoFrame] | None:
        """Decode a packet, or what is left in the decoder; None if it is broken."""
        try:
            return self._stream.codec_context.decode(packet)
        except av.error.FFmpegError:
            return None

    def _packets_from(self, start: int, *, is_careful: bool) -> Iterator[tuple[int, av.Packet]]:
        """Return numbered packets from a start on, or from as far before it as decoding has to begin."""
        target = self._index.starts[start]
        for earlier in range(start, -1, -1):
            number = self._index.starts[earlier].packet
            self._go_to(number)
            packets = self._numbered(number)
            head = next(packets, None)
            if head is None:
                continue
            recover = packets_to_recover(bytes(head[1]), self._packets.codec, self._stream.codec_context.extradata)
            room = 0 if is_careful else (target.packet - number) // PACKETS_PER_REFERENCE
            is_far_enough = recover is not None and recover <= room
            if is_far_enough or not earlier:
                return chain([head], packets)
        return iter(())

    def _numbered(self, first: int) -> Iterator[tuple[int, av.Packet]]:
        """Number the packets from a given one on, which is the next one or comes later."""
        number, header = self._next, None
        for packet in self._demuxed:
            if number >= len(self._packets) or packet.size != self._packets.size.item(number):
                self.seeks = (
                    False  # Another packet than the index lists: it was not where the seek was thought to end.
                )
                return
            self._next = number + 1
            if packet.has_sidedata(NEW_HEADER):
                header = packet.get_sidedata(NEW_HEADER)
            if number >= first:
                if header is not None:
                    packet.set_sidedata(header)
                    header = None
                yield number, packet
            number += 1

    def _go_to(self, first: int) -> None:
        """Move to a packet or before it."""
        self._stream.codec_context.flush_buffers()
        if self._next == first:
            return
        target = self._packets.seek_target(first) if self.seeks else None
        if target is not None:
            self.seeks = self._seek(first, target)
        if not 0 <= self._next <= first:
            self._open()

    def _seek(self, first: int, target: int) -> bool:
        """Seek to a keyframe; False if it does not come."""
        self._next = -1
        by_bytes = self._packets.is_by_bytes
        try:
            self._container.seek(target, stream=self._stream, unsupported_byte_offset=by_bytes)
        except av.error.FFmpegError:
            return False
        self._demuxed = self._demux()
        for packet in self._demuxed:
            if packet.is_keyframe and self._packets.is_at(first, packet):
                self._demuxed = chain([packet], self._demuxed)
                self._next = first
                return True
            if packet.is_keyframe if by_bytes else packet.dts is not None and packet.dts > target:
                return False
        return False

    def _demux(self) -> Iterator[av.Packet]:
        try:
            for packet in self._container.demux(self._stream):
                if packet.size:
                    yield packet
        except TOO_SLOW as error:
            raise self._source.too_slow() from error
        except BROKEN_OFF:
            return  # As the index found as well.

    def _open(self) -> None:
        if self._container is not None:
            self._container.close()
        self._start(self._source.open(), 0)
        set_threads(self._stream, self._num_threads)

    def _start(self, container: av.container.InputContainer, number: int) -> None:
        """Read from a container whose next packet has a number; -1 if it is not known."""
        self._container, self._next = container, number
        self._stream = best_video_stream(container, self._source)
        self._demuxed = self._demux()


class _Counter:
    """Numbers frames as they come out, from a packet on before which nothing is left to show."""

    def __init__(self, index: VideoIndex, start: int):
        self._starts = list(index.starts[start:])
        self._position = self._starts[0].position

    def __call__(self, number: int) -> int:
        while self._starts and number >= self._starts[0].packet:
            self._position = self._starts.pop(0).position
        position, self._position = self._position, self._position + 1
        return position


def _nearest(
    position: int, before: tuple[int, av.VideoFrame] | None, after: tuple[int, av.VideoFrame]
) -> tuple[int, av.VideoFrame]:
    return after if before is None or after[0] - position < position - before[0] else before
