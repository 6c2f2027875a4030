"""Capture and replay of training steps and attacks as CUDA graphs."""
