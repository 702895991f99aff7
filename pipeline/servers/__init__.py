"""HTTP clients of inference servers (vLLM, SGLang, OpenAI-compatible ones), without torch."""
