"""CUDA's error codes, those that are returned here."""

from __future__ import annotations

import enum


class Code(enum.IntEnum):
    """`cudaError_t`, by the names of driver_types.h without their "cudaError"; CUresult has the same numbers."""

    InvalidValue = 1
    MemoryAllocation = 2
    InitializationError = 3
    InvalidDevice = 101
    InvalidKernelImage = 200
    DeviceUninitialized = 201
    NoKernelImageForDevice = 209
    InvalidPtx = 218
    FileNotFound = 301
    InvalidResourceHandle = 400
    IllegalState = 401
    SymbolNotFound = 500
    NotReady = 600
    IllegalAddress = 700
    LaunchTimeout = 702
    PeerAccessUnsupported = 217
    MisalignedAddress = 716
    LaunchFailure = 719
    NotSupported = 801
    StreamCaptureUnsupported = 900
    StreamCaptureInvalidated = 901
    StreamCaptureMerge = 902
    StreamCaptureUnmatched = 903
    StreamCaptureUnjoined = 904
    StreamCaptureIsolation = 905
    StreamCaptureImplicit = 906
    CapturedEvent = 907
    StreamCaptureWrongThread = 908
    Unknown = 999


class CudaError(Exception):
    """A call or queued work fails with an error code; the message is what cudaGetErrorString then says."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
