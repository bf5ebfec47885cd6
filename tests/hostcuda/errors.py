"""What hostcuda raises: one exception for each kind of mistake a kernel or its launch can make."""

from __future__ import annotations


class HostCudaError(Exception):
    """A kernel, its launch or its compilation went wrong."""


class BuildError(HostCudaError):
    """The host compiler refused a kernel text, or there is no host compiler."""


class LaunchError(HostCudaError):
    """The launch could not happen on a GPU: too many threads, too much shared memory, the wrong arguments."""


class OutOfBoundsError(HostCudaError):
    """A read or a write outside an array or outside shared memory."""


class WriteToInputError(HostCudaError):
    """A write to an array that the kernel may only read."""


class GapWrittenError(HostCudaError):
    """A write next to an output, or between the elements of a strided one."""


class UnwrittenError(HostCudaError):
    """Output elements that the kernel left as they were."""


class PoisonReadError(HostCudaError):
    """A result computed from memory that holds no data: shared memory before it is written, gaps of an input."""


class MisalignedError(HostCudaError):
    """A vector access at an address that is not a multiple of its size."""


class UndefinedBehaviourError(HostCudaError):
    """Signed overflow, a shift out of range, a local index out of bounds, division by zero, a null pointer."""


class DivergenceError(HostCudaError):
    """A barrier or warp collective that not all of the threads it names reach, or that they call with unlike masks."""


class ScheduleError(HostCudaError):
    """The bits of the result depend on the order in which threads ran: a race."""


class RaceError(HostCudaError):
    """Two accesses of threads, at least one of them a write, that nothing orders."""


class TimeLimitError(HostCudaError):
    """The kernel did not end."""


class StackOverflowError(HostCudaError):
    """A thread's local variables do not fit its stack."""
