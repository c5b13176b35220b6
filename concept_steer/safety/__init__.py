"""The safety switch: learned gated vectors and Safe Latent Diffusion behind one schema, detectors, and a check.

It fails closed: with the switch on, whatever keeps it from working raises `SafetyError`, and no picture comes out.
"""

from .check import check
from .detectors import Detector, Verdict, load_detector
from .gate import Firings, Presence
from .learning import learn_safety
from .report import SafetyReport
from .safety_set import SafeConcept, SafetySet, find_safety_set
from .settings import SafetySettings
from .switch import SafetyPlan, plan

__all__ = [
    "Detector",
    "Firings",
    "Presence",
    "SafeConcept",
    "SafetyPlan",
    "SafetyReport",
    "SafetySet",
    "SafetySettings",
    "Verdict",
    "check",
    "find_safety_set",
    "learn_safety",
    "load_detector",
    "plan",
]
