"""CUDA's runtime: streams, events, captures and graphs."""

from __future__ import annotations

import ctypes
import threading

from . import streams
from .errors import Code, CudaError
from .machine import (
    FLOAT,
    HANDLES,
    INT,
    POINTER,
    RUNTIME,
    UINT,
    ULONGLONG,
    Device,
    callback,
    enter,
    new_stream,
    raise_error,
    runtime,
    store,
    stream_of,
)


def _create_stream(out: int, flags: int = 0, priority: int = 0) -> None:
    stream = new_stream(enter(), blocking=not flags & 1, priority=priority)
    store(out, POINTER, HANDLES.add(stream))


RUNTIME["cudaStreamCreate"] = callback(_create_stream, (POINTER,))
RUNTIME["cudaStreamCreateWithFlags"] = callback(_create_stream, (POINTER, UINT))
RUNTIME["cudaStreamCreateWithPriority"] = callback(_create_stream, (POINTER, UINT, INT))


@runtime(POINTER)
def cudaStreamDestroy(handle: int) -> None:
    stream = HANDLES.remove(handle, streams.Stream)
    stream.owner.streams.discard(stream)  # its work still runs when its turn comes


@runtime(POINTER)
def cudaStreamSynchronize(handle: int) -> None:
    stream = stream_of(handle)
    stream.wait()
    assert isinstance(stream.owner, Device)
    raise_error(stream.owner)


@runtime(POINTER)
def cudaStreamQuery(handle: int) -> None:
    stream = stream_of(handle)
    stream.forbid_capture("a stream that captures is asked")
    if stream.tail is not None and not stream.tail.done:
        streams.QUEUE.step()  # so that asking again ends
        raise CudaError(Code.NotReady, "the stream has work")
    enter()


@runtime(POINTER, POINTER, POINTER)
def cudaLaunchHostFunc(handle: int, function: int, argument: int) -> None:
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)
    stream_of(handle).queue(lambda: call(argument))


@runtime(POINTER, POINTER, UINT)
def cudaStreamWaitEvent(handle: int, event: int, _flags: int) -> None:
    HANDLES.get(event, streams.Event).make_wait(stream_of(handle))


@runtime(POINTER, POINTER)
def cudaStreamGetFlags(handle: int, out: int) -> None:
    store(out, UINT, not stream_of(handle).blocking)


@runtime(POINTER, POINTER)
def cudaStreamGetPriority(handle: int, out: int) -> None:
    store(out, INT, stream_of(handle).priority)


@runtime(POINTER, POINTER)
def cudaStreamIsCapturing(handle: int, out: int) -> None:
    stream = stream_of(handle)
    if stream is stream.owner.legacy and any(other.capture for other in stream.owner.blocking_streams()):
        raise CudaError(Code.StreamCaptureImplicit, "the legacy default stream is asked while a stream captures")
    store(out, INT, 0 if stream.capture is None else 1 if stream.capture.is_valid else 2)


@runtime(POINTER, INT)
def cudaStreamBeginCapture(handle: int, mode: int) -> None:
    stream = stream_of(handle)
    if stream.capture is not None:
        raise CudaError(Code.IllegalState, "the stream captures already")
    if stream is stream.owner.legacy:
        raise CudaError(Code.StreamCaptureUnsupported, "the legacy default stream cannot capture")
    streams.Capture(stream, mode)


@runtime(POINTER, POINTER)
def cudaStreamEndCapture(handle: int, out: int) -> None:
    stream = stream_of(handle)
    store(out, POINTER, 0)
    if stream.capture is None:
        raise CudaError(Code.IllegalState, "the stream does not capture")
    if stream.capture.origin is not stream:
        raise CudaError(Code.StreamCaptureUnmatched, "another stream began the capture")
    if stream.capture.mode != streams.RELAXED and stream.capture.thread != threading.get_ident():
        raise CudaError(Code.StreamCaptureWrongThread, "another thread began the capture")
    store(out, POINTER, HANDLES.add(stream.capture.end()))


@runtime(POINTER, POINTER, ULONGLONG)
def cudaGraphInstantiate(out: int, graph: int, _flags: int) -> None:
    store(out, POINTER, HANDLES.add(tuple(HANDLES.get(graph, list))))


@runtime(POINTER, POINTER)
def cudaGraphUpload(executable: int, handle: int) -> None:
    HANDLES.get(executable, tuple)
    stream_of(handle)


@runtime(POINTER, POINTER)
def cudaGraphLaunch(executable: int, handle: int) -> None:
    streams.launch_graph(list(HANDLES.get(executable, tuple)), stream_of(handle))


@runtime(POINTER)
def cudaGraphDestroy(graph: int) -> None:
    HANDLES.remove(graph, list)


@runtime(POINTER)
def cudaGraphExecDestroy(executable: int) -> None:
    HANDLES.remove(executable, tuple)


def _create_event(out: int, flags: int = 0) -> None:
    enter()
    store(out, POINTER, HANDLES.add(streams.Event(timed=not flags & 2)))


RUNTIME["cudaEventCreate"] = callback(_create_event, (POINTER,))
RUNTIME["cudaEventCreateWithFlags"] = callback(_create_event, (POINTER, UINT))


@runtime(POINTER)
def cudaEventDestroy(handle: int) -> None:
    HANDLES.remove(handle, streams.Event)


@runtime(POINTER, POINTER)
def cudaEventRecord(event: int, handle: int) -> None:
    HANDLES.get(event, streams.Event).record(stream_of(handle))


@runtime(POINTER)
def cudaEventSynchronize(handle: int) -> None:
    event = HANDLES.get(handle, streams.Event)
    event.forbid_capture()
    streams.QUEUE.run_until([event.work])
    enter()


@runtime(POINTER)
def cudaEventQuery(handle: int) -> None:
    event = HANDLES.get(handle, streams.Event)
    event.forbid_capture()
    if event.work is not None and not event.work.done:
        streams.QUEUE.step()  # so that asking again ends
        raise CudaError(Code.NotReady, "the event has not been reached")
    enter()


@runtime(POINTER, POINTER, POINTER)
def cudaEventElapsedTime(out: int, first: int, last: int) -> None:
    begin, end = (HANDLES.get(handle, streams.Event) for handle in (first, last))
    for event in (begin, end):
        if event.work is None or not event.timed:
            raise CudaError(Code.InvalidResourceHandle, "an event without a time")
        if not event.work.done:
            raise CudaError(Code.NotReady, "the event has not been reached")
    store(out, FLOAT, 1e3 * (end.seconds - begin.seconds))


@runtime()
def cudaProfilerStop() -> None:
    enter()


RUNTIME["cudaProfilerStart"] = RUNTIME["cudaProfilerStop"]
