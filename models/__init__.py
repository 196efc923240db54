"""The engine: Stable Diffusion networks, one denoising step at a time. Never imports ray, fastapi or app."""
