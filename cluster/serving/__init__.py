"""Ray Serve: any class, or vLLM, as a service with replicas."""
