"""What all sections of `params.yaml` share: types of values, and how mistakes are said."""

from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, GetPydanticSchema, model_validator
from pydantic_core import core_schema

from drift.runtime.yaml_files import show

Count = Annotated[int, Field(strict=True, ge=1)]
CountOrZero = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Decay = Annotated[Number, Field(ge=0, lt=1)]
Omega = Annotated[Number, Field(ge=1)]
Switch = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True, min_length=1)]
Metric = Literal["kid", "inception_score", "precision_recall"]


def name_in(registry: Iterable[str]) -> GetPydanticSchema:
    """For pydantic: the value is one of these names."""
    return GetPydanticSchema(lambda *_: core_schema.literal_schema(list(registry)))


def repeats(values: Sequence[Any]) -> bool:
    """Whether one of the values occurs twice."""
    return len(set(values)) < len(values)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def complaints(self) -> Iterator[str]:
        """A line for each value, or combination of values, that is refused."""
        return iter(())

    def broken(self, *rules: tuple[Any, str, str]) -> Iterator[str]:
        """A complaint for each broken rule; a rule is (whether it is broken, the key, what is allowed)."""
        for is_broken, key, allowed in rules:
            if is_broken:
                value = attrgetter(key)(self)
                shown = show(list(value) if isinstance(value, tuple) else value)
                yield f"{key} = {shown}: allowed: {allowed}"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for complaint in self.complaints():
            raise ValueError(complaint)
        return self

    def without_effect(self) -> dict[str, str]:
        """The keys that change nothing beside the others, and why."""
        return {}
