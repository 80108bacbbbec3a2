"""A worker's HTTP endpoint: the OpenAI API over one worker."""
