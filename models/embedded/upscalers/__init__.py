"""The two small learned upscalers that ship with the repository, and the recipe that made them."""
