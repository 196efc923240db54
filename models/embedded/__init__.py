"""The small trained models that ship with the repository, and the recipe that makes them."""
