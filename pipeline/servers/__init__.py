"""HTTP clients of inference servers: vLLM, SGLang and whatever speaks the OpenAI API. Nothing here loads torch."""
