"""This room asks a model what holds of its states: the same text read in other ways must give the same numbers."""

from refine_nsp.models.checks.doctor import Diagnosis, Finding, diagnose
from refine_nsp.models.checks.ways import Ways, ways_of

__all__ = ["Diagnosis", "Finding", "Ways", "diagnose", "ways_of"]
