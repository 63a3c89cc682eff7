"""The gateways side by side: bare engine, Comp AI, Ray Serve LLM and LiteLLM."""
