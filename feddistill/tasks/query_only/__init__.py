"""Query-only models: a Python function, or an HTTP endpoint with OpenAI's completions API; never trained."""
