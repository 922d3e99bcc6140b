"""The settings of a run as frozen, typed dataclasses, and the check that fills them.

Every number that a user can set has its type and its bounds here, once, as an annotation;
`typed` turns a plain mapping (what a YAML file holds) into keyword arguments that satisfy them,
or raises one sentence. No hydra, no omegaconf, no torch.
"""

import difflib
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from prune_cli.errors import UserError


@dataclass(frozen=True)
class Bounds:
    """Allowed range of a number, for `Annotated`; `None` is unbounded."""

    low: float | None = None
    high: float | None = None
    low_open: bool = False
    high_open: bool = False

    def admit(self, value: float) -> bool:
        if self.low is not None and (value < self.low or (self.low_open and value == self.low)):
            return False
        if self.high is not None and (value > self.high or (self.high_open and value == self.high)):
            return False
        return value == value  # NaN satisfies no bound

    def __str__(self) -> str:
        parts = []
        if self.low is not None:
            parts.append(f"{'above' if self.low_open else 'at least'} {self.low:g}")
        if self.high is not None:
            parts.append(f"{'below' if self.high_open else 'at most'} {self.high:g}")
        return " and ".join(parts) or "a finite number"


Ratio = Annotated[float, Bounds(0, 1, high_open=True)]
Fraction = Annotated[float, Bounds(0, 1)]
Positive = Annotated[float, Bounds(0, low_open=True)]
NonNegative = Annotated[float, Bounds(0)]
Count = Annotated[int, Bounds(1)]
Natural = Annotated[int, Bounds(0)]


@dataclass(frozen=True)
class FitSettings:
    """One training run: what the optimizer does and for how long.

    `schedule`: `constant`; `step` multiplies `lr` by `gamma` at each of `milestones` (fractions of
    the run); `one_cycle` rises linearly to `lr` over the first fifth and falls along a cosine to
    zero. `lr` is the peak.
    """

    epochs: Natural
    batch_size: Count
    optimizer: Literal["sgd", "adam"]
    lr: Positive
    momentum: Annotated[float, Bounds(0, 1, high_open=True)]
    nesterov: bool
    weight_decay: NonNegative
    schedule: Literal["constant", "step", "one_cycle"]
    milestones: tuple[Fraction, ...] = ()
    gamma: Positive = 0.1


Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Recipe:
    """How the stages train: one FitSettings each, and what they share."""

    name: str
    pretrain: FitSettings
    sparsify: FitSettings
    finetune: FitSettings
    precision: Precision = "auto"
    validation: Annotated[float, Bounds(0, 1, high_open=True)] = 0.1
    limit: Count | None = None


@dataclass(frozen=True)
class Runtime:
    """Where and how fast a run computes; never part of a result's key."""

    device: Literal["auto", "cpu", "cuda"]
    threads: Count | None
    workers: Natural
    data_root: str
    store: str
    latency_seconds: NonNegative


def nearest(name: str, allowed) -> str:
    """The part of an error sentence that says what is allowed, closest first: 'did you mean ...'."""
    names = sorted({str(a) for a in allowed})
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    return "allowed: " + ", ".join(names) if names else "nothing is allowed here"


def typed(target: Callable, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check `values` against the signature of `target` and return them as its keyword arguments.

    Parameters that `values` leaves out must have a default in the signature. `where` is the dotted
    path of the mapping ("recipe.pretrain"), used in the sentence.
    Raises UserError: unknown name, missing name, wrong type, value out of bounds.
    """
    parameters = inspect.signature(target).parameters
    hints = get_type_hints(target if inspect.isfunction(target) else target.__init__, include_extras=True)
    if inspect.isclass(target):
        hints = {**get_type_hints(target, include_extras=True), **hints}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for name in values:
        if name not in named and not open_ended:
            raise UserError(f"{where}.{name}: there is no such setting; {nearest(name, named)}")
    for name in sorted(named - set(values)):
        if parameters[name].default is inspect.Parameter.empty:
            raise UserError(f"{where}.{name} is missing and has no default")
    return {name: checked(value, hints.get(name, Any), f"{where}.{name}") for name, value in values.items()}


def checked(value: Any, hint: Any, where: str) -> Any:
    """`value` as an instance of the annotation `hint`, or a UserError that names `where`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any or hint is inspect.Parameter.empty:
        return value
    if origin is Annotated:
        value = checked(value, arguments[0], where)
        for bound in arguments[1:]:
            if isinstance(bound, Bounds) and value is not None and not bound.admit(value):
                raise UserError(f"{where}={value}: must be {bound}")
        return value
    if origin is Literal:
        if value not in arguments or isinstance(value, bool) != any(a is value for a in arguments if isinstance(a, bool)):
            raise UserError(f"{where}={value}: {nearest(value, ['null' if a is None else a for a in arguments])}")
        return value
    if origin in (Union, types.UnionType):
        return _checked_union(value, arguments, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}={value}: must be a list, for example [0.5,0.75]")
        return tuple(checked(v, arguments[0], f"{where}[{i}]") for i, v in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}={value}: must be a mapping, for example {{name:0.5}}")
        return {k: checked(v, arguments[1], f"{where}.{k}") for k, v in value.items()}
    if inspect.isclass(hint):
        return _checked_class(value, hint, where)
    return value


def _checked_union(value: Any, options: tuple, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    problems = []
    for option in options:
        if option is not type(None):
            try:
                return checked(value, option, where)
            except UserError as problem:
                problems.append(problem)
    sentence = str(problems[-1])
    raise UserError(f"{sentence} (or null)" if type(None) in options and not sentence.endswith("?") else sentence)


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _checked_class(value: Any, kind: type, where: str) -> Any:
    if isinstance(value, Mapping) and hasattr(kind, "__dataclass_fields__"):
        return kind(**typed(kind, value, where))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        shown = "null" if value is None else value
        raise UserError(f"{where}={shown}: must be {_WORDS.get(kind, kind.__name__)}")
    return value
