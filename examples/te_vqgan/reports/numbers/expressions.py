"""The language of markers: names, arithmetic and a few functions, and nothing that could run code.

An expression has the syntax of Python and is only ever parsed. Each node of the tree is looked up in a short list;
anything else, such as an import or a method, is refused.
"""

from __future__ import annotations

import ast

from examples.te_vqgan.reports.numbers.values import FUNCTIONS, OPERATORS, Place, Sample, Value, mean
from examples.te_vqgan.runs.checks import require_choice

__all__ = ["evaluate"]

_SYMBOLS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def evaluate(expression: str, data: Place) -> Value:
    """Return the value of ``expression``.

    Args:
        expression: such as ``"welch_p(vqgan.t2i.quads, te_vqgan.t2i.quads)"``.
        data: where its names are looked up.

    Raises:
        ValueError: it has another syntax, or names something that the data or the language does not have.
    """
    try:
        tree = ast.parse(" ".join(expression.split()), mode="eval")
    except SyntaxError:
        raise ValueError(f"expression must be names, numbers, + - * / and calls, got {expression!r}.") from None
    try:
        return _value(tree.body, data)
    except KeyError as error:
        raise ValueError(f"expression must be one that has a value, got {expression!r} (no {error}).") from error
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(f"expression must be one that has a value, got {expression!r} ({error}).") from error


def _value(node: ast.expr, data: Place) -> Value:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return float(number)
        case ast.Name(id=name):
            return data.get(name)
        case ast.Attribute(value=inner, attr=name):
            return _place(inner, data).get(name)
        case ast.Subscript(value=inner, slice=ast.Constant(value=int() | str() as key)):
            return _place(inner, data).at(key)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _combined("*", -1.0, _value(operand, data))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _SYMBOLS:
            return _combined(_SYMBOLS[type(op)], _value(left, data), _value(right, data))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            return FUNCTIONS[name](*(_value(argument, data) for argument in arguments))
        case ast.Call(func=ast.Name() | ast.Attribute() as inner, args=[], keywords=options):
            chosen = {str(option.arg): _option(option.value) for option in options}
            return _place(inner, data).select(**chosen)
        case ast.Call(func=ast.Name(id=name), keywords=[]):
            require_choice("function", name, tuple(FUNCTIONS))
    raise ValueError(f"expression must be names, numbers, + - * / and calls, got {ast.unparse(node)!r}.")


def _place(node: ast.expr, data: Place) -> Place:
    found = _value(node, data)
    if not isinstance(found, Place):
        raise ValueError(f"{ast.unparse(node)} must have parts, got the number {found:g}.")  # noqa: TRY004
    return found


def _option(node: ast.expr) -> int | float | str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Constant(value=int() | float() | str() as value):
            return value
    raise ValueError(f"option must be a name or a number, got {ast.unparse(node)!r}.")


def _combined(symbol: str, left: Value, right: Value) -> Value:
    """Combine by seed where both are samples, else value by value."""
    function = OPERATORS[symbol]
    match left, right:
        case Sample(), Sample():
            return left.paired(right, function)
        case Sample(), _:
            other = mean(right)
            return left.map(lambda value: function(value, other))
        case _, Sample():
            other = mean(left)
            return right.map(lambda value: function(other, value))
    return function(mean(left), mean(right))
