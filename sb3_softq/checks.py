"""Checks of arguments: every message names the argument, its value and what would be right."""

import math
from numbers import Integral, Real
from typing import Any


def check_number(
    name: str,
    value: Any,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    positive: bool = False,
    finite: bool = True,
) -> None:
    """
    Raise unless ``value`` is a number between ``minimum`` and ``maximum``.

    :param name: how the user calls the argument
    :param value: what the user passed
    :param minimum: smallest allowed value
    :param maximum: largest allowed value
    :param positive: whether the value must be above 0
    :param finite: whether infinities are refused (NaN always is)
    :raises TypeError: for something that is not a real number
    :raises ValueError: for a number that is out of range
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {value!r} of type {type(value).__name__}")
    number = float(value)
    if math.isnan(number) or (finite and math.isinf(number)):
        raise ValueError(f"{name} must be finite, not {value!r}")
    if positive and number <= 0:
        raise ValueError(f"{name} must be positive, not {value!r}")
    if not minimum <= number <= maximum:
        wanted = f"at least {minimum:g}" if maximum == math.inf else f"at most {maximum:g}"
        if minimum > -math.inf and maximum < math.inf:
            wanted = f"between {minimum:g} and {maximum:g}"
        raise ValueError(f"{name} must be {wanted}, not {value!r}")


def check_integer(name: str, value: Any, minimum: int) -> None:
    """
    Raise unless ``value`` is a whole number of at least ``minimum``.

    :param name: how the user calls the argument
    :param value: what the user passed
    :param minimum: smallest allowed value
    :raises TypeError: for something that is not a whole number
    :raises ValueError: for a number below ``minimum``
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, not {value!r} of type {type(value).__name__}")
    check_number(name, value, minimum)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """
    Raise unless ``value`` is one of ``choices``.

    :param name: how the user calls the argument
    :param value: what the user passed
    :param choices: the allowed strings
    :raises TypeError: for something that is not a string
    :raises ValueError: for another string
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {list(choices)}, not {value!r} of type {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, not {value!r}")


def check_bool(name: str, value: Any) -> None:
    """
    Raise unless ``value`` is a boolean.

    :param name: how the user calls the argument
    :param value: what the user passed
    :raises TypeError: for something else
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r} of type {type(value).__name__}")
