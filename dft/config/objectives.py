"""The objectives of the DFT family and their parameters, for the command line, its help and the documents.

The weights themselves are in dft/loss/objectives.py, with their sources.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf

from dft.config.options import did_you_mean
from dft.errors import UserError


@dataclass(frozen=True)
class Parameter:
    """A number that an objective takes: the default, the range, and what it is."""

    default: float
    least: float
    most: float
    help: str

    @property
    def is_whole(self) -> bool:
        return isinstance(self.default, int)


@dataclass(frozen=True)
class Objective:
    """What is known of an objective before torch is imported.

    Attributes:
        formula: of the weight of a token. p is the probability of the correct token, p_ref the one by the weights that
            the training began with, H the entropy.
        needs_reference: whether the weight needs p_ref.
    """

    formula: str
    parameters: dict[str, Parameter] = field(default_factory=dict)
    needs_reference: bool = False


MAX_RATIO = Parameter(10.0, 1.0, inf, "the greatest p_ref / p")
OBJECTIVES = {
    "dft": Objective("p**gamma, see --dft_gamma"),
    "sft": Objective("1"),
    "threshold": Objective(
        "p**power where p >= tau, else 0",
        {
            "tau": Parameter(0.1, 0.0, 1.0, "the least p that is trained on"),
            "power": Parameter(0.0, 0.0, inf, "0: plain cross-entropy there"),
        },
    ),
    "eaft": Objective(
        "(H of the top_k likeliest tokens / scale)**exponent",
        {
            "exponent": Parameter(1.0, 0.0, inf, "how much the entropy counts"),
            "top_k": Parameter(20, 2, 1000, "tokens whose entropy is taken"),
            "scale": Parameter(3.0, 1e-3, inf, "in nats; log(20) is 3.0"),
        },
    ),
    "deft": Objective("p**sum(p_v**2)"),
    "idft": Objective(
        "p**clip(exp(-(log p + H) / temperature), low, high)",
        {
            "temperature": Parameter(1.0, 1e-3, inf, "in nats"),
            "low": Parameter(0.1, 0.0, inf, "the least exponent"),
            "high": Parameter(2.0, 0.0, inf, "the greatest exponent"),
        },
    ),
    "talr": Objective(
        "max(p**(1/tau), least), tau the median over rows of their mean cross-entropy in the step before",
        {
            "tau": Parameter(1.0, 1e-3, inf, "in the first step"),
            "least": Parameter(0.01, 0.0, 1.0, "the least weight"),
        },
    ),
    "chord": Objective("p * (1 - p)"),
    "prior": Objective("p_ref", needs_reference=True),
    "anchored": Objective(
        "p + strength * (min(p_ref / p, max_ratio) - 1)",
        {"strength": Parameter(0.01, 0.0, inf, "how much the model is held"), "max_ratio": MAX_RATIO},
        needs_reference=True,
    ),
    "importance": Objective(
        "clip(p / p_ref, low, high)",
        {
            "low": Parameter(0.2, 0.0, inf, "the least p / p_ref"),
            "high": Parameter(1.8, 0.0, inf, "the greatest p / p_ref"),
        },
        needs_reference=True,
    ),
}


def describe_parameters() -> str:
    """The parameters of all objectives with their defaults, in one sentence each."""
    told = []
    for name, objective in OBJECTIVES.items():
        parameters = [f"{key}={value.default:g} ({value.help})" for key, value in objective.parameters.items()]
        if parameters:
            told.append(f"{name}: {', '.join(parameters)}")
    return "; ".join(told)


def read_arguments(objective: str, given: Iterable[str] | Mapping[str, float] | None) -> dict[str, float]:
    """All parameters of an objective, {name: value}, those that were not given with their defaults.

    Args:
        given: words such as "tau=0.3", or one that is a JSON object; or a mapping.

    Raises:
        UserError: an unknown objective or parameter, or a value outside its range.
    """
    if objective not in OBJECTIVES:
        known, meant = ", ".join(OBJECTIVES), did_you_mean(objective, OBJECTIVES)
        raise UserError(f"--objective is {objective!r}{meant}; it must be one of {known}")
    parameters = OBJECTIVES[objective].parameters
    values = {name: parameter.default for name, parameter in parameters.items()}
    for name, text in _pairs(given):
        if name not in parameters:
            own = f"its parameters are {', '.join(parameters)}" if parameters else "it has no parameters"
            others = [other for other, about in OBJECTIVES.items() if name in about.parameters]
            owner = f"; {name} belongs to {', '.join(others)}" if others else did_you_mean(name, parameters)
            raise UserError(f"--objective_args: {objective} has no parameter {name}{owner}; {own}")
        values[name] = _number(f"--objective_args {name}", text, parameters[name])
    if "low" in values and values["low"] > values["high"]:
        raise UserError(f"--objective_args: low is {values['low']:g} and high is {values['high']:g}; low must be less")
    return values


def _pairs(given: Iterable[str] | Mapping[str, float] | None) -> list[tuple[str, object]]:
    """Names and values, from words or a mapping."""
    if isinstance(given, Mapping):
        return list(given.items())
    pairs: dict[str, object] = {}
    for word in [given] if isinstance(given, str) else given or ():
        if word.lstrip().startswith("{"):
            try:
                found = json.loads(word)
            except ValueError as error:
                raise UserError(f"--objective_args {word!r} is no JSON object: {error}") from error
        else:
            name, equals, value = word.partition("=")
            if not equals:
                raise UserError(f"--objective_args {word!r}: write it as name=value, such as tau=0.3")
            found = {name: value}
        if twice := pairs.keys() & found.keys():
            raise UserError(f"--objective_args: {', '.join(sorted(twice))} is given twice")
        pairs |= found
    return list(pairs.items())


def _number(what: str, value: object, parameter: Parameter) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UserError(f"{what} is {value!r}; it must be a number") from None
    if isinstance(value, bool) or not parameter.least <= number <= parameter.most or number == inf:
        limit = (
            f"from {parameter.least:g} to {parameter.most:g}"
            if parameter.most < inf
            else f"a finite number, {parameter.least:g} or more"
        )
        raise UserError(f"{what} is {value}; it must be {limit}")
    if parameter.is_whole and number != int(number):
        raise UserError(f"{what} is {value}; it must be a whole number")
    return int(number) if parameter.is_whole else number
