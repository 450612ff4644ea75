"""`ProxyModelForCausalLM`: a frozen LM with a gate on it, saved and loaded like an adapter."""
