"""Distillation: a small model that learns to give what a large one gives."""
