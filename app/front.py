"""What stands first in a model's application where Serve's HAProxy mode is on.

HAProxy chooses among the replicas of each application's first deployment itself, so Ray 2.60 refuses one there whose
calls are to be routed by us (`build_app` of `ray.serve`). Nothing is ever sent to this one: the gateway calls the
model behind it.
"""

from typing import Any


class Front:
    """An application's first deployment, around its model."""

    def __init__(self, model: Any):
        """Binding the model is all that brings it into the application."""
        self.model = model
