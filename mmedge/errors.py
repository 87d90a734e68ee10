"""Exceptions of mmedge.

```
MmedgeError
├── BundleError
│   ├── ManifestError            the manifest is missing, malformed, too new or self-contradictory
│   ├── IntegrityError           a file is missing, changed, or lies outside the bundle
│   └── SignatureError           a signature is missing or does not match
├── InputError                   what the caller passed in
│   ├── ShapeError
│   ├── DTypeError
│   ├── ImageError               an image cannot be read or is rejected
│   ├── AudioError               audio cannot be read or is rejected
│   └── TextError                a text cannot be encoded or is rejected
├── ConversionError
│   ├── SourceError              the model to convert is missing, unsafe or unknown
│   ├── CalibrationError         the calibration or evaluation data cannot be used
│   ├── ExportError              torch -> ONNX failed
│   ├── QuantizationError        a quantization method cannot be applied
│   ├── EngineBuildError         ONNX -> engine failed
│   └── ParityError              the converted model's outputs differ from the original's
├── BackendError
│   ├── BackendUnavailableError  the engine is not installed or refuses to start
│   ├── PlacementError           what would run is not what was requested
│   ├── TimeLimitError           a graph did not end in time
│   └── EngineMismatchError      an engine of another version, device or model
├── StorageError                 the disk is full, read-only, or otherwise in the way
├── ProfileError                 a measurement cannot be made, or a gate did not hold
└── RetrievalError
    ├── SpaceMismatchError       vectors of two embedding spaces were to be compared
    └── IndexCorruptedError
```

A message names the cause, the value got, the value expected, and the fix.
"""

__all__ = [
    "AudioError",
    "BackendError",
    "BackendUnavailableError",
    "BundleError",
    "CalibrationError",
    "ConversionError",
    "DTypeError",
    "EngineBuildError",
    "EngineMismatchError",
    "ExportError",
    "ImageError",
    "IndexCorruptedError",
    "InputError",
    "IntegrityError",
    "ManifestError",
    "MmedgeError",
    "ParityError",
    "PlacementError",
    "ProfileError",
    "QuantizationError",
    "RetrievalError",
    "ShapeError",
    "SignatureError",
    "SourceError",
    "SpaceMismatchError",
    "StorageError",
    "TextError",
    "TimeLimitError",
]


class MmedgeError(Exception):
    """Base class of all mmedge exceptions."""


class BundleError(MmedgeError):
    """A bundle cannot be opened, created or trusted."""


class ManifestError(BundleError):
    """The manifest is missing, malformed, too new or self-contradictory."""


class IntegrityError(BundleError):
    """A file of the bundle is missing, changed, or lies outside the bundle."""


class SignatureError(BundleError):
    """A bundle's signature is missing or does not match."""


class InputError(MmedgeError):
    """The caller's input cannot be used."""


class ShapeError(InputError):
    """An array has the wrong shape."""


class DTypeError(InputError):
    """An array has the wrong dtype."""


class ImageError(InputError):
    """An image cannot be read or is rejected."""


class AudioError(InputError):
    """Audio cannot be read or is rejected."""


class TextError(InputError):
    """A text cannot be encoded or is rejected."""


class ConversionError(MmedgeError):
    """A model cannot be converted."""


class SourceError(ConversionError):
    """The model to convert is missing, unsafe or of an unknown architecture."""


class CalibrationError(ConversionError):
    """The calibration or evaluation data cannot be used."""


class ExportError(ConversionError):
    """Export from PyTorch to ONNX failed."""


class QuantizationError(ConversionError):
    """A quantization method cannot be applied."""


class EngineBuildError(ConversionError):
    """Building an engine from ONNX failed."""


class ParityError(ConversionError):
    """The converted model's outputs differ from the original's."""


class BackendError(MmedgeError):
    """A backend failed."""


class BackendUnavailableError(BackendError):
    """A backend is not installed, or does not start on this machine."""


class PlacementError(BackendError):
    """The graph would not run where it was asked to."""


class TimeLimitError(BackendError):
    """A graph exceeded its time limit."""


class EngineMismatchError(BackendError):
    """An engine was built for another version, device or model."""


class StorageError(MmedgeError):
    """Storage is full, read-only or otherwise unusable."""


class ProfileError(MmedgeError):
    """A measurement failed, or a gate on one did not hold."""


class RetrievalError(MmedgeError):
    """A query on an index failed."""


class SpaceMismatchError(RetrievalError):
    """Vectors of different embedding spaces cannot be compared."""


class IndexCorruptedError(RetrievalError):
    """An index on disk is damaged."""
