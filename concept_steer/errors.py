"""Everything a user may meet. Each message: which file or vector, what was found, what was expected, the way out."""

from __future__ import annotations


class ConceptSteerError(Exception):
    """The base of all errors meant for the user's eyes: the message is one or two full sentences."""


class VectorFileError(ConceptSteerError):
    """A vector file cannot be read, is not what it claims to be, or cannot be written."""


class FamilyMismatch(ConceptSteerError):
    """A vector of one model family meets a vector or a model of another."""


class LibraryError(ConceptSteerError):
    """A name that is not in the library, or that may not be a name."""


class LearnError(ConceptSteerError):
    """Learning cannot start or cannot go on."""


class SettingError(ConceptSteerError, ValueError):
    """A number or a choice out of its range (a strength that is not finite, an empty window, ...)."""


class SafetyError(ConceptSteerError):
    """The safety switch is on and cannot do its work: no picture may come out."""
