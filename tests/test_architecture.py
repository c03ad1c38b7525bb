"""The shape of the package, read from its syntax trees: who imports whom, how long things are."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "expediter"

MODULE_LINES_MAX = 450
FUNCTION_LINES_MAX = 70

#: Who may import whom: every wing, and every module at the door. A part of a wing is named by its place, as in
#: `backends/brokers`; that does not open the modules in it. What `*` has everybody may use. Imports under
#: TYPE_CHECKING and inside functions count. A new wing gets its line here first.
ALLOWED: dict[str, frozenset[str]] = {
    "__main__": frozenset({"run"}),
    "run": frozenset({"web", "work", "upkeep", "payments", "fulfilment", "queued", "store", "backends"})
    | {"orders", "settings", "trial"},
    "web": frozenset(
        {"queued", "store", "backends/brokers", "backends/cache", "backends/tasks", "orders", "settings"}
    )
    | {"backends/addresses", "backends/tallies"},
    "upkeep": frozenset({"payments", "fulfilment", "queued", "store", "backends", "orders", "settings"}),
    "work": frozenset({"payments", "fulfilment", "store", "orders"})
    | {"backends/brokers", "backends/batching", "backends/points", "backends/tasks"}
    | {"backends/addresses", "backends/outside"},
    "queued": frozenset({"store", "backends", "orders"}),
    "store": frozenset({"backends", "orders"}),
    "payments": frozenset({"orders", "backends/calls"}),
    "fulfilment": frozenset({"orders", "backends/calls"}),
    "settings": frozenset({"orders"}),
    "testing": frozenset({"payments", "fulfilment", "orders"}),
    "trial": frozenset({"orders/money"}),
    "orders": frozenset(),
    "backends": frozenset(),
    "*": frozenset({"__init__", "errors", "telemetry"}),
}

#: Who may import a part that one place alone is to know.
_SQL = frozenset({"backends/databases", "store"})
OWNERS: dict[str, frozenset[str]] = {
    "sqlalchemy": _SQL | {"backends/brokers/database"},
    "alembic": frozenset({"store/migrations"}),
    "sqlite3": _SQL,
    "asyncpg": frozenset({"backends/databases", "store/migrations"}),
    "asyncmy": frozenset({"backends/databases", "store/migrations"}),
    "httptools": frozenset({"web/server"}),
    "offapi": frozenset({"web"}),
    "redis": frozenset({"backends"}),
    "limits": frozenset({"backends/tallies", "settings/written"}),
    "aio_pika": frozenset({"backends/brokers"}),
    "aiohttp": frozenset({"backends/calls", "backends/outside", "trial"}),
    "stripe": frozenset({"payments/stripe", "payments/stripe_calls", "payments/stripe_documents"}),
}

#: Where money is counted or an order decided: no float may come to be here.
EXACT = frozenset({"errors", "orders"})
#: What of it counts no money: chances, spans of time, and made-up orders.
INEXACT = frozenset({"orders/resilience", "orders/samples", "orders/documents"})

#: Where everything may be caught and not raised again: "module:function" -> the reason why.
ALLOWED_LAST_RESORT: dict[str, str] = {
    "backends/tasks:Background._run": "it is logged whole and the work begins again: nobody else would do it",
    "store/committer:Committer._commit": "one request's bug is its own: the batch is divided",
    "store/committer:Committer._publish": "what is stored is answered as stored, whatever a listener does",
    "store/committer:Committer._run": "all in a broken batch must hear of it, and the next go on",
    "work/worker:Worker._attempt": "what fails for an unforeseen reason is counted, then parked",
    "web/__init__:_Application.__call__": "a bug answers its own request with a 500; it is logged with its id",
    "web/__init__:_Application._answer": "the same for a request that has to wait",
}


class Module(NamedTuple):
    """One source file: its place in the package, as in `web/orders`, and what it says."""

    place: str
    text: str
    tree: ast.Module

    @property
    def wing(self) -> str:
        return self.place.split("/")[0]

    def is_in(self, places: frozenset[str]) -> bool:
        """Tell whether one of `places` is this module, or a folder around it."""
        parts = self.place.split("/")
        return any("/".join(parts[:count]) in places for count in range(1, len(parts) + 1))


class Named(NamedTuple):
    """A function or class and its dotted name within its module."""

    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def read_modules() -> list[Module]:
    modules = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        place = path.relative_to(PACKAGE).with_suffix("").as_posix()
        modules.append(Module(place, text, ast.parse(text, filename=str(path))))
    return modules


MODULES = read_modules()
PLACES = frozenset(module.place.removesuffix("/__init__") for module in MODULES)
WINGS = frozenset(module.wing for module in MODULES)


def imported_names(module: Module) -> Iterator[tuple[int, str]]:
    """Give the line and the absolute dotted name of everything that a module imports."""
    package = ["expediter", *module.place.split("/")[:-1]]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            origin = package[: len(package) - node.level + 1] if node.level else []
            origin += node.module.split(".") if node.module else []
            for alias in node.names:
                yield node.lineno, ".".join([*origin, alias.name])


def imported_places(module: Module) -> Iterator[tuple[int, str]]:
    """Give the line and the place of everything of ours that a module imports."""
    for line, name in imported_names(module):
        top, *parts = name.split(".")
        if top != "expediter":
            continue
        while parts and "/".join(parts) not in PLACES:
            parts.pop()
        yield line, "/".join(parts) or "__init__"


def functions_and_classes(module: Module) -> Iterator[Named]:
    """Give every function and class of a module, nested ones included, outer before inner."""

    def descend(parent: ast.AST, prefix: str) -> Iterator[Named]:
        for child in ast.iter_child_nodes(parent):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield Named(prefix + child.name, child)
                yield from descend(child, f"{prefix}{child.name}.")
            else:
                yield from descend(child, prefix)

    yield from descend(module.tree, "")


def public_definitions(parent: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[Named]:
    """Give the functions, classes and methods that a reader from outside can name; overloads have no say."""
    for node in parent.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_") or any("overload" in ast.unparse(d) for d in node.decorator_list):
            continue
        yield Named(prefix + node.name, node)
        if isinstance(node, ast.ClassDef):
            yield from public_definitions(node, f"{prefix}{node.name}.")


def names_everything(expression: ast.expr | None) -> bool:
    """Tell whether an except clause, or one of its alternatives, catches every error."""
    if expression is None:
        return True
    if isinstance(expression, ast.Tuple):
        return any(names_everything(item) for item in expression.elts)
    return ast.unparse(expression).removeprefix("builtins.") in {"Exception", "BaseException"}


def raises(statements: list[ast.stmt]) -> bool:
    """Tell whether statements raise themselves, functions that they only define left aside."""
    waiting: list[ast.AST] = list(statements)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Raise):
            return True
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))
    return False


def is_suppress(call: ast.Call) -> bool:
    """Tell whether a call makes contextlib's quiet except clause."""
    return ast.unparse(call.func) in {"suppress", "contextlib.suppress"}


def last_resorts(module: Module) -> Iterator[tuple[str, int]]:
    """Give "module:function" and the line of everything that catches all errors and raises none."""

    def descend(parent: ast.AST, inside: str) -> Iterator[tuple[str, int]]:
        for node in ast.iter_child_nodes(parent):
            match node:
                case ast.ExceptHandler() if names_everything(node.type) and not raises(node.body):
                    yield f"{module.place}:{inside}", node.lineno
                case ast.Call() if is_suppress(node) and any(map(names_everything, node.args)):
                    yield f"{module.place}:{inside}", node.lineno
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from descend(node, f"{inside}.{node.name}".lstrip("."))
            else:
                yield from descend(node, inside)

    yield from descend(module.tree, "")


def test_every_wing_is_in_the_table() -> None:
    """Every top-level module and folder of the package has its line in ALLOWED."""
    unknown = sorted(WINGS - ALLOWED.keys() - ALLOWED["*"])
    assert not unknown, f"add these to ALLOWED, with what each may import: {unknown}"


def test_the_arrows_form_no_circle() -> None:
    """No wing reaches itself by the arrows of ALLOWED."""
    arrows = {wing: {place.split("/")[0] for place in allowed} for wing, allowed in ALLOWED.items() if wing != "*"}
    assert set(TopologicalSorter(arrows).static_order()) == ALLOWED.keys() - {"*"}


def test_modules_form_no_circle() -> None:
    """No module reaches itself by its imports; that a package opens its own modules by address is no arrow."""
    arrows = {}
    for module in MODULES:
        place = module.place.removesuffix("/__init__")
        arrows[place] = {other for _, other in imported_places(module) if not other.startswith(f"{place}/")}
    list(TopologicalSorter(arrows).static_order())  # raises CycleError, which names the circle


def test_imports_follow_the_arrows() -> None:
    """A wing imports only what its line in ALLOWED names."""
    strangers = []
    for module in MODULES:
        allowed = ALLOWED.get(module.wing, frozenset()) | ALLOWED["*"]
        for line, place in imported_places(module):
            wing = place.split("/")[0]
            if wing != module.wing and wing not in allowed and place not in allowed:
                strangers.append(f"{module.place}.py:{line} imports {place}; it may import {sorted(allowed)}")
    assert not strangers, "\n".join(strangers)


def test_a_part_is_known_to_its_owners_alone() -> None:
    """The SQL toolkit, the HTTP parser, drivers and the like are each imported by the places in OWNERS only."""
    strangers = [
        f"{module.place}.py:{line} imports {name}; only {sorted(owners)} may"
        for module in MODULES
        for line, name in imported_names(module)
        if (owners := OWNERS.get(name.split(".")[0])) is not None
        if not module.is_in(owners)
    ]
    assert not strangers, "\n".join(strangers)


def test_only_the_composition_root_opens_things() -> None:
    """Outside the wing that defines it, an open_* function is named by `run` alone."""
    homes = {
        named.name: module.wing
        for module in MODULES
        for named in functions_and_classes(module)
        if named.name.startswith("open_") and module.wing != "run"
    }
    strangers = []
    for module in MODULES:
        if module.wing == "run":
            continue
        for node in ast.walk(module.tree):
            match node:
                case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
                    if homes.get(name, module.wing) != module.wing:
                        strangers.append(f"{module.place}.py:{node.lineno} uses {name}; only `run` may")
    assert not strangers, "\n".join(strangers)


def test_modules_stay_short() -> None:
    """No module is longer than MODULE_LINES_MAX lines."""
    long = [
        f"{module.place}.py has {lines} lines"
        for module in MODULES
        if (lines := len(module.text.splitlines())) > MODULE_LINES_MAX
    ]
    assert not long, "\n".join(long)


def test_functions_stay_short() -> None:
    """No function is longer than FUNCTION_LINES_MAX lines, docstring included."""
    long = [
        f"{module.place}.py:{node.lineno} {name} has {lines} lines"
        for module in MODULES
        for name, node in functions_and_classes(module)
        if not isinstance(node, ast.ClassDef)
        if (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES_MAX
    ]
    assert not long, "\n".join(long)


def test_public_things_say_what_they_do() -> None:
    """Every public function, class and method has a docstring, save the migrations' two by contract."""
    silent = [
        f"{module.place}.py:{node.lineno} {name} has no docstring"
        for module in MODULES
        for name, node in public_definitions(module.tree)
        if not ast.get_docstring(node)
        if not (module.place.startswith("store/migrations/versions/") and name in {"upgrade", "downgrade"})
    ]
    assert not silent, "\n".join(silent)


def test_errors_are_not_swallowed() -> None:
    """Whoever catches every error raises one, or stands in ALLOWED_LAST_RESORT with a reason."""
    found = {key: line for module in MODULES for key, line in last_resorts(module)}
    swallowed = [
        f"{key} (line {line}) catches everything and raises nothing: name the errors you expect, "
        f"raise again, or give {key!r} its reason in ALLOWED_LAST_RESORT"
        for key, line in found.items()
        if not ALLOWED_LAST_RESORT.get(key)
    ]
    assert not swallowed, "\n".join(swallowed)
    assert ALLOWED_LAST_RESORT.keys() <= found.keys(), "a last resort is gone: remove its line from the table"


def test_every_error_is_drawn() -> None:
    """The tree in `errors.py` has every error of the package, each below its parent."""
    drawing = next(ast.get_docstring(module.tree) or "" for module in MODULES if module.place == "errors")
    lines = re.finditer(r"^([│├└][│├└─ ]*)([A-Z]\w+)", drawing, re.M)
    depth = {"ExpediterError": 0} | {line[2]: len(line[1]) // 4 for line in lines}
    found = {"ExpediterError": 0}
    classes = [node for module in MODULES for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)]
    while more := [
        (node.name, found[ast.unparse(base)] + 1)
        for node in classes
        for base in node.bases
        if ast.unparse(base) in found and node.name not in found
    ]:
        found.update(more)
    assert found == depth


def test_money_is_never_a_float() -> None:
    """No float is made, and no float literal written, where money is counted or an order decided."""
    floats = [
        f"{module.place}.py:{node.lineno} {ast.unparse(node)}"
        for module in MODULES
        if module.is_in(EXACT) and not module.is_in(INEXACT)
        for node in ast.walk(module.tree)
        if (isinstance(node, ast.Call) and ast.unparse(node.func) == "float")
        or (isinstance(node, ast.Constant) and isinstance(node.value, float))
    ]
    assert not floats, "\n".join(floats)
