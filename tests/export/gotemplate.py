"""The part of Go's text/template that the Modelfiles use, compared with Go 1.27.3's own output on every case here."""

import json
import re
from collections.abc import Iterator
from typing import Any

TOKEN = re.compile(r'\s*(\(|\)|"(?:\\.|[^"\\])*"|\$?[\w.]+|\$|:=|=|,)')
ACTION = re.compile(r'(\{\{(?:"(?:\\.|[^"\\])*"|[^"])*?\}\})')
Nodes = list[Any]


def execute(template: str, messages: list[dict[str, str]]) -> str:
    """Renders as Ollama does: the messages of a chat, `Role` and `Content` each."""
    pieces = [piece for piece in ACTION.split(template) if piece]
    for number, piece in enumerate(pieces):
        if piece.startswith("{{- ") and number:
            pieces[number - 1] = (
                pieces[number - 1].rstrip() if not pieces[number - 1].startswith("{{") else pieces[number - 1]
            )
    nodes, rest = parse(pieces)
    assert not rest
    root = {"Messages": [{"Role": one["role"], "Content": one["content"]} for one in messages]}
    return "".join(render(nodes, [{"$": root}], root))


def parse(pieces: list[str]) -> tuple[Nodes, list[str]]:
    nodes: Nodes = []
    while pieces:
        piece = pieces.pop(0)
        if not piece.startswith("{{"):
            nodes.append(("text", piece))
            continue
        action = piece.removeprefix("{{").removesuffix("}}").removeprefix("- ").strip()
        word = action.split(" ")[0]
        if word in ("end", "else"):
            return nodes, [action, *pieces]
        if word in ("if", "range"):
            nodes.append(block(word, action.removeprefix(word), pieces))
        else:
            nodes.append(("action", action))
    return nodes, []


def block(word: str, head: str, pieces: list[str]) -> Any:
    body, rest = parse(pieces)
    action, pieces[:] = rest[0], rest[1:]
    other: Nodes = []
    if action.startswith("else if"):
        other = [block("if", action.removeprefix("else if"), pieces)]
    elif action == "else":
        other, rest = parse(pieces)
        pieces[:] = rest[1:]
    return word, head, body, other


def render(nodes: Nodes, scopes: list[dict[str, Any]], dot: Any) -> Iterator[str]:
    for node in nodes:
        if node[0] == "text":
            yield node[1]
        elif node[0] == "action":
            found = re.match(r"(\$\w+) (:?=) (.*)", node[1], flags=re.S)
            if not found:
                yield str(evaluate(node[1], scopes, dot))
            elif found[2] == ":=":
                scopes[-1][found[1]] = evaluate(found[3], scopes, dot)
            else:
                next(scope for scope in reversed(scopes) if found[1] in scope)[found[1]] = evaluate(
                    found[3], scopes, dot
                )
        elif node[0] == "if":
            yield from render(node[2] if evaluate(node[1], scopes, dot) else node[3], [*scopes, {}], dot)
        else:
            names, _, over = node[1].partition(" := ")
            values = evaluate(over, scopes, dot)
            for number, value in enumerate(values if isinstance(values, list) else range(values)):
                declared = [name.strip() for name in names.split(",")]
                bound = dict(
                    zip(
                        declared,
                        [number, value][-len(declared) :] if len(declared) == 1 else [number, value],
                        strict=True,
                    )
                )
                yield from render(node[2], [*scopes, bound], value)


def evaluate(text: str, scopes: list[dict[str, Any]], dot: Any) -> Any:
    tokens = TOKEN.findall(text)
    value, rest = call(tokens, scopes, dot)
    assert not rest, rest
    return value


def call(tokens: list[str], scopes: list[dict[str, Any]], dot: Any) -> tuple[Any, list[str]]:
    values: list[Any] = []
    while tokens and tokens[0] != ")":
        token, tokens = tokens[0], tokens[1:]
        if token == "(":
            inner, tokens = call(tokens, scopes, dot)
            token, tokens = tokens[1] if len(tokens) > 1 and tokens[1].startswith(".") else "", tokens[1:]
            values.append(inner[token[1:]] if token else inner)
            tokens = tokens[1:] if token else tokens
        else:
            values.append(operand(token, scopes, dot))
    return (values[0](*values[1:]) if callable(values[0]) else values[0]), tokens


def operand(token: str, scopes: list[dict[str, Any]], dot: Any) -> Any:
    functions = {
        "eq": lambda one, other: one == other,
        "not": lambda one: not one,
        "len": lambda text: len(text.encode()),
        "or": lambda *all_: next((one for one in all_ if one), all_[-1]),
        "and": lambda *all_: next((one for one in all_ if not one), all_[-1]),
        "index": lambda values, number: values[number],
        "printf": lambda form, text: text[:1] if form == "%.1s" else form % text,
        "slice": lambda text, first, last=None: text.encode()[first:last].decode(errors="surrogateescape"),
        "true": True,
        "false": False,
    }
    if token in functions:
        return functions[token]
    if token.startswith('"'):
        return json.loads(token)
    if token.isdigit():
        return int(token)
    name, _, field = token.partition(".")
    value = dot if not name else next(scope[name] for scope in reversed(scopes) if name in scope)
    return value[field] if field else value
