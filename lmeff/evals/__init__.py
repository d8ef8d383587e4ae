"""Measuring models by tasks: perplexity with strided windows, choices, continuations, the lm-evaluation-harness."""
