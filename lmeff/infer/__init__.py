"""Generation: the cache, prefill and decode, sampling, speculative decoding."""
