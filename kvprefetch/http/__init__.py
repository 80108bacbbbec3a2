"""A worker's HTTP endpoint: the part of the OpenAI API that a language model needs, over one worker."""
