"""The settings of a run as frozen, typed dataclasses, and the check that fills them.

Every number that a user can set has its type and its bounds here, once, as an annotation;
`typed` turns a plain mapping (what a YAML file holds) into keyword arguments that satisfy them,
or raises one sentence. No hydra, no omegaconf, no torch.
"""

import difflib
import inspect
import math
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
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


@dataclass(frozen=True)
class Choice:
    """Allowed words that are known only when they are asked for, for `Annotated`."""

    options: Callable[[], Collection[str]]


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


Start = Literal["trained", "learning_rate", "rewind", "scratch_e", "scratch_b"]
Control = Literal["learning_rate", "rewind", "scratch_e", "scratch_b", "random"]


@dataclass(frozen=True)
class FinetuneSettings(FitSettings):
    """How the cut network is trained again.

    start  `trained` fine-tunes: the surviving weights, with the settings that stand here. All others
           train as pretrain does: `learning_rate` the surviving weights, `rewind` their values of
           after `rewind_epoch` epochs of pretrain, both with the schedule from that epoch on (Renda et
           al., ICLR 2020; the lottery ticket of Frankle & Carbin, ICLR 2019, at epoch 0); `scratch_e`
           new initial weights for as many epochs, `scratch_b` for as many multiply-adds as pretrain
           took, its epochs times dense / pruned MACs (Liu et al., "Rethinking the Value of Network
           Pruning", ICLR 2019)
    rewind_step  optimizer step of pretrain to go back to instead of an epoch (Frankle et al., "Linear Mode
           Connectivity and the Lottery Ticket Hypothesis", ICML 2020: a few hundred). The training from
           there begins with the rest of the epoch that the step lies in
    distillation, temperature  weight and temperature of the term that teaches the dense network's
           answers (see `distillation`), whatever the start
    """

    start: Start = "trained"
    rewind_epoch: Natural = 0
    rewind_step: Natural | None = None
    distillation: NonNegative = 0.0
    temperature: Positive = 4.0

    @property
    def fit(self) -> FitSettings:
        """The training run alone."""
        return FitSettings(**{field.name: getattr(self, field.name) for field in fields(FitSettings)})


Kernel = Literal["auto", "torch", "cpp", "cupy"]  # what computes stripe convolutions when a latency is measured
Precision = Literal["auto", "float32", "bfloat16"]
Target = Literal["units", "macs", "params"]  # what `ratio` is a fraction of
Constant = Literal["drop", "fold"]  # what becomes of the constant that a removed channel would go on emitting


@dataclass(frozen=True)
class Recipe:
    """How the stages train: one FitSettings each, and what they share.

    controls  what the cut network's training is compared with: other values of `finetune.start`,
              and `random`, the random selection trained as finetune trains the method's
    """

    name: str
    pretrain: FitSettings
    sparsify: FitSettings
    finetune: FinetuneSettings
    precision: Precision = "auto"
    validation: Annotated[float, Bounds(0, 1, high_open=True)] = 0.1
    limit: Count | None = None
    controls: tuple[Control, ...] = ()


@dataclass(frozen=True)
class Runtime:
    """Where and how fast a run computes; never part of a result's key."""

    device: Literal["auto", "cpu", "cuda"]
    threads: Count | None
    workers: Natural
    data_root: str
    store: str
    latency_seconds: NonNegative
    kernel: Kernel = "auto"


def close_names(name: str, allowed: Iterable[str]) -> list[str]:
    """Up to three of the `allowed` names that a misspelt `name` may have meant, closest first."""
    return difflib.get_close_matches(str(name), [str(a) for a in allowed], n=3, cutoff=0.6)


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The part of an error sentence that says what is allowed, closest first: 'did you mean ...'."""
    names = list(dict.fromkeys(str(a) for a in allowed))
    listed = "allowed: " + ", ".join(names) if names else "nothing is allowed here"
    close = close_names(name, names)
    return f"did you mean {' or '.join(close)}? ({listed})" if close else listed


def typed(
    target: Callable, values: Mapping[str, Any], where: str = "", supplied: Collection[str] = ()
) -> dict[str, Any]:
    """Check `values` against the signature of `target` and return them as its keyword arguments.

    Parameters that `values` leaves out must have a default in the signature, except the ones that
    the caller has `supplied` itself, which a user may not set. `where` is the dotted path of the
    mapping ("recipe.pretrain"), used in the sentence.
    Raises UserError: unknown name, missing name, wrong type, value out of bounds.
    """
    parameters = inspect.signature(target).parameters
    hints = _hints(target)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    named -= set(supplied)
    prefix = f"{where}." if where else ""
    for name in values:
        if name in supplied or (name not in named and not open_ended):
            raise UserError(f"{prefix}{name}: there is no such setting; {nearest(name, sorted(named))}")
    for name in sorted(named - set(values)):
        if parameters[name].default is inspect.Parameter.empty:
            raise UserError(f"{prefix}{name} is missing and has no default")
    return {name: checked(value, hints.get(name, Any), f"{prefix}{name}") for name, value in values.items()}


def _hints(target: Callable) -> dict[str, Any]:
    """Annotations by parameter. A dataclass may inherit fields from other modules, where only the
    class knows how to read an annotation written as text."""
    if inspect.isclass(target) and not is_dataclass(target):
        target = target.__init__
    try:
        return get_type_hints(target, include_extras=True)
    except NameError:  # a user's annotation that only a type checker can read
        return {}


def checked(value: Any, hint: Any, where: str) -> Any:
    """`value` as an instance of the annotation `hint`, or a UserError that names `where`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any or hint is inspect.Parameter.empty:
        return value
    if origin is Annotated:
        result = checked(value, arguments[0], where)
        for bound in arguments[1:]:
            if isinstance(bound, Bounds) and result is not None and not bound.admit(result):
                raise UserError(f"{where}={shown(value)}: must be {bound}")
            if isinstance(bound, Choice) and result not in (options := bound.options()):
                raise UserError(f"{where}={shown(value)}: {nearest(result, options)}")
        return result
    if origin is Literal:
        for option in arguments:
            if type(option) is type(value) and option == value:  # True == 1 == 1.0 elsewhere
                return option
        raise UserError(f"{where}={shown(value)}: {nearest(value, map(shown, arguments))}")
    if origin in (Union, types.UnionType):
        return _checked_union(value, arguments, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            example = "[conv1,layer1.*]" if arguments[0] is str else "[0.5,0.75]"
            raise UserError(f"{where}={shown(value)}: must be a list, for example {example}")
        return tuple(checked(v, arguments[0], f"{where}[{i}]") for i, v in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}={shown(value)}: must be a mapping, for example {{name:0.5}}")
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
    if is_dataclass(kind):
        if isinstance(value, Mapping):
            return kind(**typed(kind, value, where))
        if not isinstance(value, kind):
            names = nearest("", kind.__dataclass_fields__)
            raise UserError(f"{where}={shown(value)}: holds several settings; {names}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf  # float() of more raises
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where}={shown(value)}: must be {_WORDS.get(kind, kind.__name__)}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{where}={value}: must be a finite number")
    return value


def shown(value: Any) -> str:
    """A value as one writes it in YAML."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
