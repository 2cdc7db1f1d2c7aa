"""SAMI pretraining: teachers and cached features."""
