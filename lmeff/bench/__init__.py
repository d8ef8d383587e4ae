"""How fast a model decodes and reads prompts on this machine, beside its memory's bandwidth."""
