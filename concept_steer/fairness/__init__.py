"""Fair and responsible generation: wanted shares of attributes, a gate, responsible phrases, and a report.

In the order of use: `learn_attribute`, `Target`, `find_phrases`, `open_attributes`, `assign`, `steers`, `report`.
"""

from .assignment import Assignment, Target, assign, steers, target_of
from .attributes import Attribute, Value
from .gate import Gate, GateDecision
from .learning import learn_attribute, learn_gate
from .phrases import Action, Found, check_phrases, find_phrases, load_phrases, without_phrases
from .plan import Plan, open_attributes, plan
from .report import chance_deviation, describe, interpolation_curve, report

__all__ = [
    "Action",
    "Assignment",
    "Attribute",
    "Found",
    "Gate",
    "GateDecision",
    "Plan",
    "Target",
    "Value",
    "assign",
    "chance_deviation",
    "check_phrases",
    "describe",
    "find_phrases",
    "interpolation_curve",
    "learn_attribute",
    "learn_gate",
    "load_phrases",
    "open_attributes",
    "plan",
    "report",
    "steers",
    "target_of",
    "without_phrases",
]
