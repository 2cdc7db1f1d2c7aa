"""The model family: what a Hub repository carries. It imports torch, numpy, PIL and transformers only."""
