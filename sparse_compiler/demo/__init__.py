"""A small byte-level retriever: record prompts, the model, its trained checkpoint."""
