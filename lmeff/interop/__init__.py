"""Weights of others in and out: safetensors, Hugging Face folders, llama2.c files, compressed-tensors, GGUF."""
