"""The finite filters of scipy.signal along one axis of NumPy or CuPy arrays, computed by gpuconv's convolutions.

Names, arguments, results and the kinds of errors are SciPy's, with two differences. The functions work along one axis:
for arrays with several axes `convolve` and `correlate` need `axis=` and `oaconvolve` needs `axes=`, and the other axes
are broadcast. And the direct method is `gpuconv.conv1d`: on a GPU the bits of a result depend neither on the length nor
on other signals. Integers are exact, and wrap around in the dtype that SciPy gives the result.
"""

from .convolution import convolve, correlate, oaconvolve
from .filters import decimate_fir, firfilter, resample_poly, upfirdn

__all__ = ["convolve", "correlate", "decimate_fir", "firfilter", "oaconvolve", "resample_poly", "upfirdn"]
