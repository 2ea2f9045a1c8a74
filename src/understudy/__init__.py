"""understudy: an embeddable runtime for the sessions of AI-agent apps."""
