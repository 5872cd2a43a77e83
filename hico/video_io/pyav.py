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
from hico.video_io.index import BROKEN_OFF, Keyframe, VideoIndex, best_video_stream
from hico.video_io.resize import ExactResizer
from hico.video_io.runs import Run, plan_runs
from hico.video_io.source import Source, VideoError

SKIPS_UNREFERENCED = frozenset({"h264", "mpeg4", "mpeg2video", "mpeg1video"})
"""Codecs whose B-frames that nothing refers to are marked for certain. HEVC is not one: its "sub-layer non-reference"
pictures may still be referred to from higher temporal layers, which phones write."""


class PyAVReader(Reader):
    """The default reader: decodes everything that FFmpeg does, and goes on after damage."""

    def decode(self, source, index, wanted, sink, *, resizer, num_threads, max_ahead):
        starts = [keyframe.position for keyframe in index.keyframes]
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
            self._decoder = _Decoder(self._source, self._index, self._num_threads)
        done = self._decode_quickly(run)
        if done < run.last:
            self._decode_carefully(Run(run.keyframe, done, run.last))

    def close(self) -> None:
        if self._decoder is not None:
            self._decoder.close()

    def _decode_quickly(self, run: Run) -> int:
        """Decode nothing that is not needed; returns the first sample that did not come out."""
        pts = self._index.pts[self._wanted[run.first : run.last]].tolist()
        done = 0
        for time, frame in self._decoder.frames(run.keyframe, only=set(pts)):
            if time > pts[done]:
                break
            if time == pts[done]:
                self._finish(run.first + done, time, frame)
                done += 1
                if done == len(pts):
                    break
        return run.first + done

    def _decode_carefully(self, run: Run) -> None:
        """Decode every frame; the nearest good one stands in for a lost sample."""
        previous: tuple[int, av.VideoFrame] | None = None
        here = run.first
        # On one thread: with several, FFmpeg gives the frames after a broken one each other's timestamps.
        with closing(_Decoder(self._source, self._index, 1)) as decoder:
            for time, frame in decoder.frames(run.keyframe):
                while here < run.last and self._pts(here) <= time:
                    if self._pts(here) < time and previous is None:
                        previous = self._last_before(run.keyframe)
                    self._finish(here, *_nearest(self._pts(here), previous, (time, frame)))
                    here += 1
                previous = (time, frame)
                if here == run.last:
                    return
        previous = previous or self._last_before(run.keyframe)
        if previous is None:
            begin = self._index.seconds_of(self._pts(run.first))
            raise VideoError(
                f"{self._source.name}: no frame could be decoded from {begin:.2f} s on; "
                "the file is damaged. Fetch it again, or set end to an earlier time"
            )
        for position in range(here, run.last):
            self._finish(position, *previous)

    def _last_before(self, keyframe: int) -> tuple[int, av.VideoFrame] | None:
        """Return the last good frame before a keyframe, from as far back as it takes."""
        limit = self._index.pts[self._index.keyframes[keyframe].position]
        with closing(_Decoder(self._source, self._index, 1)) as decoder:
            for earlier in reversed(range(keyframe)):
                found = None
                for time, frame in decoder.frames(earlier):
                    if time >= limit:
                        break
                    found = (time, frame)
                if found is not None:
                    return found
        return None

    def _finish(self, here: int, time: int, frame: av.VideoFrame) -> None:
        self.num_lost += time != self._pts(here)
        self._sink.put(here, self._resizer(frame), self._index.seconds_of(time))

    def _pts(self, here: int) -> int:
        return int(self._index.pts[self._wanted[here]])


class _Decoder:
    """One open container."""

    def __init__(self, source: Source, index: VideoIndex, num_threads: int):
        self._source, self._index, self._num_threads = source, index, num_threads
        self._open()

    def close(self) -> None:
        self._container.close()

    def frames(self, keyframe: int, *, only: set[int] | None = None) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield good frames with their timestamps, in display order.

        Args:
            keyframe: number of the keyframe to start from.
            only: timestamps of the frames that matter. Frames that no other needs may be missing, and decoding ends
                with the last one of these, or at the first error. If omitted, every good frame up to the end.
        """
        start = self._index.keyframes[keyframe]
        context = self._stream.codec_context
        timed = self._index.timed
        missing = set(only) if only is not None and timed else None
        may_skip = missing is not None and context.name in SKIPS_UNREFERENCED
        earliest = start.pts if start.pts is not None else 0
        number = 0
        context.skip_frame = "DEFAULT"
        for packet in chain(self._packets_from(start), [None]):
            if may_skip and packet is not None:
                context.skip_frame = "DEFAULT" if packet.pts in only else "NONREF"
            frames = self._decode(packet)
            if frames is None and only is not None:
                return
            for frame in frames or ():
                time = frame.pts if timed else number
                number += 1
                if time is not None and time >= earliest and not frame.is_corrupt:
                    yield time, frame
            if missing is not None and packet is not None:
                missing.discard(packet.pts)
                if not missing:
                    yield from ((frame.pts, frame) for frame in self._decode(None) or ())
                    return

    def _decode(self, packet: av.Packet | None) -> list[av.VideoFrame] | None:
        """Decode a packet, or what is left in the decoder; None if it is broken."""
        try:
            return self._stream.codec_context.decode(packet)
        except av.error.FFmpegError:
            return None

    def _packets_from(self, start: Keyframe) -> Iterator[av.Packet]:
        """Return the packets from a keyframe on; what a demuxer gives before it is passed over."""
        is_fresh, self._is_fresh = self._is_fresh, False
        if is_fresh and start is self._index.keyframes[0]:
            return self._demux()
        target = start.dts if start.dts is not None else start.pts
        if target is not None:
            try:
                self._container.seek(target, stream=self._stream, backward=True)
            except av.error.FFmpegError:
                pass  # Cannot seek: read from the beginning.
            else:
                packets = _from(start, self._demux())
                if packets is not None:
                    return packets
        self.close()
        self._open()
        self._is_fresh = False
        return _from(start, self._demux()) or iter(())

    def _demux(self) -> Iterator[av.Packet]:
        try:
            for packet in self._container.demux(self._stream):
                if packet.size:
                    yield packet
        except BROKEN_OFF:
            return  # As the index found as well.

    def _open(self) -> None:
        self._container = self._source.open()
        self._stream = best_video_stream(self._container, self._source)
        self._stream.codec_context.thread_count = self._num_threads
        self._stream.codec_context.thread_type = "AUTO" if self._num_threads > 1 else "SLICE"
        self._is_fresh = True


def _from(start: Keyframe, packets: Iterator[av.Packet]) -> Iterator[av.Packet] | None:
    """Pass over the packets before a keyframe; None if it is not among them, because the seek went too far."""
    for packet in packets:
        if start.pts is None or packet.pts == start.pts:
            return chain([packet], packets)
        if None not in (start.dts, packet.dts) and packet.dts > start.dts:
            return None
    return None


def _nearest(
    pts: int, before: tuple[int, av.VideoFrame] | None, after: tuple[int, av.VideoFrame]
) -> tuple[int, av.VideoFrame]:
    return after if before is None or after[0] - pts < pts - before[0] else before
