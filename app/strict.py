"""What all settings have in common: they refuse what they do not know, and do not change."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9._-]{1,64}$")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Strict(BaseModel):
    """Refuses unknown keys and does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)
