"""The types that fields of the configuration are made of."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationInfo

# No count of a run comes near it, and floats hold every whole number up to it.
MOST = 2**53

NO_SECRETS = "a password does not belong into a configuration, which is kept and logged"
# What stands before the host of an address: of web addresses a name alone may be a token, of databases it is a user.
USERINFO = re.compile(r"((?<=http://)|(?<=https://))[^/?#\s]+@|(?<=://)[^/?#:\s]*:[^?#\s]*@", re.IGNORECASE)
SECRET_IN_QUERY = re.compile(
    r"(?<=[?&;])([^=&;\s]*(?:passw|pwd|token|secret|api_?key|auth|credential)[^=&;\s]*=)[^&;\s'\"]+", re.IGNORECASE
)


def hide_secrets(text: str) -> str:
    """The text with *** for the user and password before a host, and for secrets in the query of an address."""
    return SECRET_IN_QUERY.sub(r"\1***", USERINFO.sub("***@", text))


class Strict(BaseModel):
    """A frozen block of the configuration in which a misspelt key is an error, not a default."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        # A form made from the schema calls every option as YAML and the messages do.
        field_title_generator=lambda key, _: key,
        model_title_generator=lambda block: _key_of(block.__name__),
    )


def _key_of(block: str) -> str:
    """The key under which a block stands: `early_stopping` for EarlyStopping, `kl` for KlConfig."""
    return re.sub("(?<=[a-z])(?=[A-Z])", "_", block.removesuffix("Config")).lower()


def existing(path: str, info: ValidationInfo) -> str:
    """The path as it is; ValueError when paths are to be checked and there is nothing at this one."""
    if (info.context or {}).get("check_paths") and not _is_there(path):
        raise ValueError(f"there is no file or folder {hide_secrets(path):.200}; relative paths start at {Path.cwd()}")
    return path


def _is_there(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError):  # a name longer than names can be, or the home of a user who does not exist
        return False


def as_tuple(value: object) -> object:
    """One text as a list of one."""
    return (value,) if isinstance(value, str) else value


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _free_name(name: str) -> str:
    if name in ("train", "valid", "test", "replay", "new_task"):
        raise ValueError(f"{name} is taken by the run; use another name")
    return name


# Whole numbers are strict. Other numbers may be text: PyYAML reads 1e-3, without a point, as a string.
PositiveInt = Annotated[int, Field(gt=0, le=MOST, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MOST, strict=True)]
Number = Annotated[float, BeforeValidator(_no_bool)]
PositiveFloat = Annotated[Number, Field(gt=0)]
NonNegativeFloat = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(gt=0, lt=1)]
SafeName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
ExistingPath = Annotated[str, StringConstraints(min_length=1), AfterValidator(existing)]
Paths = Annotated[tuple[ExistingPath, ...], BeforeValidator(as_tuple)]
RetentionName = Annotated[SafeName, AfterValidator(_free_name)]
