"""Readers: one per data format, each a torch Dataset of samples with an image and its masks or labels."""
