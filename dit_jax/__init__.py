"""Diffusion transformers in JAX: train, sample, evaluate and study how they scale."""
