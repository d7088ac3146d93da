"""Ahead of time: what a training step or a scoring call needs on chips that this machine does not have."""
