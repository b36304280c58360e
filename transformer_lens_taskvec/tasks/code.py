"""Code tasks: identifier case, number bases, operators, built-ins and file extensions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import product

from transformer_lens_taskvec.tasks.base import Task, by_name, mapping_task

# All have at least two digits in base 16, so in every base the answer differs from the input.
_NUMBERS = range(16, 116)

_VERBS = ("get", "set", "load", "save", "find", "parse", "update", "remove", "check", "count")
_NOUNS = (
    "user_name", "file_path", "max_size", "error_code", "line_number", "default_value", "row",
    "token", "image_width", "cache",
)  # fmt: skip

# With both operands written out, "-" is a difference or a sign and not either.
_OPERATORS = {
    "a + b": "add", "a - b": "sub", "a * b": "mul", "a / b": "truediv", "a // b": "floordiv",
    "a % b": "mod", "a ** b": "pow", "a @ b": "matmul", "a & b": "and_", "a | b": "or_",
    "a ^ b": "xor", "a << b": "lshift", "a >> b": "rshift", "a < b": "lt", "a <= b": "le",
    "a == b": "eq", "a != b": "ne", "a >= b": "ge", "a > b": "gt", "a is b": "is_",
    "a is not b": "is_not", "not a": "not_", "-a": "neg", "+a": "pos", "~a": "invert",
    "b in a": "contains", "a[b]": "getitem", "a[b] = c": "setitem", "del a[b]": "delitem",
    "a += b": "iadd", "a -= b": "isub", "a *= b": "imul", "a /= b": "itruediv",
    "a //= b": "ifloordiv", "a %= b": "imod", "a **= b": "ipow", "a @= b": "imatmul",
    "a &= b": "iand", "a |= b": "ior", "a ^= b": "ixor", "a <<= b": "ilshift",
    "a >>= b": "irshift",
}  # fmt: skip

_PYTHON_JAVASCRIPT = {
    "print": "console.log", "len": "length", "int": "parseInt", "float": "parseFloat",
    "str": "String", "bool": "Boolean", "abs": "Math.abs", "max": "Math.max", "min": "Math.min",
    "pow": "Math.pow", "any": "some", "all": "every", "sorted": "toSorted",
    "reversed": "toReversed", "enumerate": "entries", "input": "prompt", "type": "typeof",
    "isinstance": "instanceof", "chr": "String.fromCharCode", "list": "Array.from",
    "set": "Set", "getattr": "Reflect.get", "setattr": "Reflect.set", "hasattr": "Reflect.has",
    "delattr": "Reflect.deleteProperty", "Exception": "Error", "None": "null", "True": "true",
    "False": "false", "functools.reduce": "reduce", "str.upper": "toUpperCase",
    "str.lower": "toLowerCase", "str.strip": "trim", "str.lstrip": "trimStart",
    "str.rstrip": "trimEnd", "str.replace": "replaceAll", "str.find": "indexOf",
    "str.rfind": "lastIndexOf", "str.startswith": "startsWith", "str.endswith": "endsWith",
    "str.rjust": "padStart", "str.ljust": "padEnd", "str.join": "join", "str.split": "split",
    "list.append": "push", "list.pop": "pop", "list.copy": "slice", "list.index": "indexOf",
    "list.sort": "sort", "list.reverse": "reverse", "dict.keys": "Object.keys",
    "dict.values": "Object.values", "dict.items": "Object.entries",
    "dict.update": "Object.assign", "dict.fromkeys": "Object.fromEntries", "set.add": "add",
    "set.discard": "delete", "set.clear": "clear", "set.union": "union",
    "set.intersection": "intersection", "set.symmetric_difference": "symmetricDifference",
    "set.issubset": "isSubsetOf", "set.issuperset": "isSupersetOf",
    "set.isdisjoint": "isDisjointFrom", "math.floor": "Math.floor", "math.ceil": "Math.ceil",
    "math.trunc": "Math.trunc", "math.sqrt": "Math.sqrt",
    "math.exp": "Math.exp", "math.expm1": "Math.expm1", "math.log": "Math.log",
    "math.log2": "Math.log2", "math.log10": "Math.log10", "math.log1p": "Math.log1p",
    "math.sin": "Math.sin", "math.cos": "Math.cos", "math.tan": "Math.tan",
    "math.asin": "Math.asin", "math.acos": "Math.acos", "math.atan": "Math.atan",
    "math.atan2": "Math.atan2", "math.sinh": "Math.sinh", "math.cosh": "Math.cosh",
    "math.tanh": "Math.tanh", "math.hypot": "Math.hypot", "math.pi": "Math.PI",
    "math.e": "Math.E", "math.inf": "Infinity", "math.nan": "NaN",
    "math.isnan": "Number.isNaN", "math.isfinite": "Number.isFinite",
    "random.random": "Math.random", "time.time": "Date.now", "json.loads": "JSON.parse",
    "json.dumps": "JSON.stringify", "re.compile": "RegExp", "copy.deepcopy": "structuredClone",
    "os.getcwd": "process.cwd", "sys.argv": "process.argv", "os.environ": "process.env",
    "sys.exit": "process.exit", "asyncio.gather": "Promise.all",
    "urllib.parse.quote": "encodeURIComponent", "urllib.parse.unquote": "decodeURIComponent",
}  # fmt: skip

# Extensions that are common in several languages, such as .pl, .m, .v and .h, are left out.
_EXTENSIONS = {
    "ABAP": "abap", "Ada": "adb ads", "Agda": "agda", "AutoHotkey": "ahk", "AWK": "awk",
    "Bash": "bash", "BibTeX": "bib", "C": "c", "C#": "cs", "C++": "cc cpp cxx hpp",
    "Clojure": "clj", "ClojureScript": "cljs", "CMake": "cmake", "CoffeeScript": "coffee",
    "Crystal": "cr", "CSS": "css", "CUDA": "cu cuh", "Cython": "pyx pxd", "D": "d",
    "Dafny": "dfy", "Dart": "dart", "Dhall": "dhall", "Elixir": "ex exs", "Elm": "elm",
    "Erlang": "erl hrl", "F#": "fsx fsi", "Fish": "fish", "Fortran": "f90 f95 f03",
    "GDScript": "gd", "Gleam": "gleam", "GLSL": "glsl", "Go": "go", "GraphQL": "graphql gql",
    "Groovy": "groovy", "Haml": "haml", "Haskell": "hs", "Haxe": "hx", "HLSL": "hlsl",
    "HTML": "html htm", "Idris": "idr", "Java": "java", "JavaScript": "js jsx mjs cjs",
    "JSON": "json", "Julia": "jl", "Kotlin": "kt kts", "Lean": "lean", "Less": "less",
    "Lua": "lua", "Markdown": "md markdown", "Nim": "nim nims", "Nix": "nix",
    "OCaml": "ml mli", "Odin": "odin", "Pascal": "pas", "PHP": "php php5",
    "PowerShell": "ps1 psm1", "Pug": "pug", "PureScript": "purs", "Python": "py pyi pyw",
    "Racket": "rkt", "Raku": "raku", "reStructuredText": "rst", "Ruby": "rb",
    "Rust": "rs", "Sass": "sass", "Scala": "scala", "Scheme": "scm", "SCSS": "scss",
    "Solidity": "sol", "SQL": "sql", "Svelte": "svelte", "Swift": "swift",
    "SystemVerilog": "sv svh", "Tcl": "tcl", "TOML": "toml", "TypeScript": "ts tsx",
    "VHDL": "vhd vhdl", "Vim script": "vim", "Vue": "vue", "Vyper": "vy", "WGSL": "wgsl",
    "XML": "xml", "YAML": "yaml yml", "Zig": "zig",
}  # fmt: skip

Pairs = Iterable[tuple[str, str]]


def _identifiers() -> Iterator[tuple[str, str]]:
    for verb, noun in product(_VERBS, _NOUNS):
        first, *others = f"{verb}_{noun}".split("_")
        yield "_".join([first, *others]), first + "".join(word.capitalize() for word in others)


def _numerals(spec: str) -> Iterator[tuple[str, str]]:
    return ((str(number), format(number, spec)) for number in _NUMBERS)


def _reversed(pairs: Pairs) -> Iterator[tuple[str, str]]:
    return ((y, x) for x, y in pairs)


_PAIRS: dict[str, Callable[[], Pairs]] = {
    "snake_camel": _identifiers,
    "camel_snake": lambda: _reversed(_identifiers()),
    "decimal_hex": lambda: _numerals("x"),
    "hex_decimal": lambda: _reversed(_numerals("x")),
    "decimal_octal": lambda: _numerals("o"),
    "octal_decimal": lambda: _reversed(_numerals("o")),
    "decimal_binary": lambda: _numerals("b"),
    "binary_decimal": lambda: _reversed(_numerals("b")),
    "operator_name": _OPERATORS.items,
    "python_javascript": _PYTHON_JAVASCRIPT.items,
    "extension_language": lambda: (
        (f".{ending}", language)
        for language, endings in _EXTENSIONS.items()
        for ending in endings.split()
    ),
}
CODE = tuple(_PAIRS)
"""The names of the tasks of :func:`code_tasks`."""


def code_tasks() -> dict[str, Task]:
    """Make the tasks about program code.

    Numerals have no prefix such as ``0x``, so the three tasks on decimal numbers have the same
    inputs and only the demonstrations tell them apart.

    Returns:
        ``snake_camel`` and ``camel_snake``: the case of identifiers. ``decimal_hex``,
        ``decimal_octal``, ``decimal_binary`` and their reverses ``hex_decimal``,
        ``octal_decimal`` and ``binary_decimal``: the numbers 16 to 115 in another base.
        ``operator_name``: the function of Python's ``operator`` module for an operator.
        ``python_javascript``: the JavaScript for a built-in, method or library function of
        Python. ``extension_language``: the language of a file extension. 100 pairs each or
        slightly more, except for ``operator_name``, which has 42.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> tasks = tv.tasks.code_tasks()
        >>> tasks["snake_camel"].pairs[0]
        Example(x='get_user_name', y='getUserName')
        >>> [tasks[name].pairs[0].y for name in ("decimal_hex", "decimal_octal", "decimal_binary")]
        ['10', '20', '10000']
    """
    return by_name([mapping_task(name, pairs()) for name, pairs in _PAIRS.items()])
