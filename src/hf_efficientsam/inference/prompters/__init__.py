"""
Prompts that are found instead of given: by saliency, by words, from a loose box or a scribble.

Each prompter prompts an [`EfficientSamPredictor`] about its image and returns a [`SegmentationResult`]:

saliency map -> separate objects -> boxes -> masks; words -> detector -> boxes -> masks.
"""

from .rough import RoughPrompter
from .saliency import SalientPrompter
from .saliency_sources import load_saliency
from .text import Detector, TextPrompter

__all__ = ["Detector", "RoughPrompter", "SalientPrompter", "TextPrompter", "load_saliency"]
