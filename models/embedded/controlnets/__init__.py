"""The embedded canny ControlNets: the recipe beside the weights that it made."""
