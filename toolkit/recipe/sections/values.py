"""What the keys of a recipe take: numbers within bounds, words; and what all of its sections share.

A validator raises ``ValueError(message, hint)``, of which ``load.py`` makes a ``UserError``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationInfo, field_validator

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Strength = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0.0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what torch and numpy take


def _count_or_auto(value: Any) -> int | Literal["auto"]:
    """A whole number of 1 or more, or the word ``auto``; a union would report both alternatives of a wrong value."""
    if value == "auto":
        return "auto"
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or (isinstance(value, float) and value != number):
        raise ValueError("not a valid value", "write auto, or a whole number of 1 or more")
    return number


CountOrAuto = Annotated[int | Literal["auto"], PlainValidator(_count_or_auto)]


def _compile(value: Any) -> Any:
    """``auto``, true, false or ``graphs``; a union would take 1 for true."""
    if value is True or value is False or value in ("auto", "graphs"):
        return value
    raise ValueError("not a valid value", "write auto, true, false or graphs")


Compile = Annotated[bool | Literal["auto", "graphs"], PlainValidator(_compile)]


def _switch(value: Any) -> Any:
    """``auto``, true or false; a union would take 1 for true."""
    if value is True or value is False or value == "auto":
        return value
    raise ValueError("not a valid value", "write auto, true or false")


SwitchOrAuto = Annotated[bool | Literal["auto"], PlainValidator(_switch)]


class Section(BaseModel):
    """What all sections share: an unknown key is an error, and a recipe never changes once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name].annotation if info.field_name else bool
        if isinstance(value, bool) and kind is not bool and bool not in get_args(kind):
            raise ValueError("true and false are not valid values", "write a value of the key's own kind")
        return value
