"""The base class of all groups of settings."""

import os.path
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Setting(BaseModel):
    """A frozen group of settings. Unknown names are errors; a field's docstring is its description."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",
    )

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, value: Any) -> Any:
        """Refuse unknown settings with the nearest known name, which pydantic's own error lacks."""
        if isinstance(value, dict):
            for key in value:
                if key not in cls.model_fields:
                    near = get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.5)
                    raise PydanticCustomError(
                        "unknown_setting",
                        "is not a setting",
                        {
                            "key": str(key),
                            "near": near[0] if near else "",
                            "known": ", ".join(cls.model_fields),
                        },
                    )
        return value


def named(value: Any) -> Any:
    """``rule: median`` is short for ``rule: {kind: median}``."""
    return {"kind": value} if isinstance(value, str) else value


def _from_home(path: Path) -> Path:
    return Path(os.path.expanduser(path))


LocalPath = Annotated[Path, AfterValidator(_from_home)]
"""A path; ``~`` at its beginning is the home directory."""
PathOrName = Annotated[str, AfterValidator(os.path.expanduser)]
"""A name on the hub or a folder; ``~`` at its beginning is the home directory."""
