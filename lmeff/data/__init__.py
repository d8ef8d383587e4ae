"""Text to batches: sources, tokenizers, token shards with digests, packing, and a loader that is a pure function of the step."""
