"""The shape of the package, read from its syntax trees: who imports whom, how long things are."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "expediter"

MODULE_LINES_MAX = 450
FUNCTION_LINES_MAX = 70

#: What everything may import. The core itself imports nothing else of ours.
CORE = frozenset({"__init__", "errors", "money", "orders", "events", "commands", "drafts", "decisions"}) | {
    "interventions"
}

#: A room is a top-level module or folder of the package; this is every arrow there may be between two rooms.
#: Imports under TYPE_CHECKING and inside functions count. A new room gets its line here first.
ALLOWED: dict[str, frozenset[str]] = {
    "__init__": frozenset(),
    "errors": CORE,
    "money": CORE,
    "orders": CORE,
    "events": CORE,
    "commands": CORE,
    "drafts": CORE,
    "decisions": CORE,
    "interventions": CORE,
    "settings": CORE,
    "telemetry": CORE,
    "resilience": CORE,
    "requests": CORE | {"resilience"},
    "documents": CORE,
    "samples": CORE,
    "schema": CORE,
    "dialects": CORE | {"schema"},
    "migrations": CORE | {"schema", "dialects"},
    "rows": CORE | {"schema", "resilience"},
    "keys": CORE | {"schema", "dialects", "requests"},
    "breakers": CORE | {"schema", "dialects", "rows", "requests", "resilience"},
    "backlog": CORE | {"schema", "dialects", "rows"},
    "store": CORE | {"schema", "dialects", "rows", "backlog", "keys", "breakers", "requests", "resilience"},
    "lookups": CORE | {"schema", "dialects", "rows", "breakers", "requests", "resilience"},
    "maintenance": CORE | {"schema", "dialects", "keys", "requests"},
    "archive": CORE | {"dialects", "maintenance"},
    "gathering": CORE,
    "redis_client": CORE,
    "cache": CORE | {"gathering", "redis_client"},
    "committer": CORE | {"dialects", "store", "lookups", "maintenance", "cache", "requests"},
    "temporary": CORE | {"gathering", "redis_client"},
    "accepted": CORE | {"brokers", "cache", "redis_client", "temporary"},
    "queries": CORE
    | {"dialects", "backlog", "lookups", "cache", "documents", "gathering", "requests", "resilience", "accepted"},
    "queued": CORE | {"requests"},
    "hints": CORE | {"brokers", "gathering", "requests"},
    "unstored": CORE
    | {"brokers", "committer", "dialects", "lookups", "queued", "redis_client", "requests", "temporary"},
    "intake": CORE
    | {"brokers", "committer", "dialects", "documents", "gathering", "keys", "lookups", "queries", "queued"}
    | {"redis_client", "requests", "temporary", "unstored"},
    "applier": CORE | {"brokers", "committer", "queued", "redis_client", "requests", "temporary"},
    "brokers": CORE | {"redis_client"},
    "payments": CORE,
    "fulfilment": CORE,
    "stages": CORE | {"payments", "fulfilment", "requests", "resilience"},
    "worker": CORE | {"stages", "committer", "requests", "resilience"},
    "web": CORE
    | {"committer", "queries", "cache", "requests", "resilience", "documents", "samples", "settings", "__init__"}
    | {"brokers", "intake", "temporary"},
    "doctor": CORE | {"brokers", "cache", "dialects", "payments", "queries", "redis_client", "temporary"},
    "connections": CORE | {"web"},
    "listener": CORE | {"connections", "web"},
    "accesslog": CORE,
    "processes": CORE,
    "background": CORE | {"processes"},
    "service": CORE
    | {
        "accesslog",
        "archive",
        "gathering",
        "processes",
        "listener",
        "settings",
        "telemetry",
        "dialects",
        "migrations",
        "lookups",
        "cache",
        "committer",
        "queries",
        "requests",
    }
    | {"payments", "fulfilment", "stages", "worker", "web", "samples"}
    | {"accepted", "applier", "brokers", "doctor", "hints", "intake", "temporary"},
    "testing": CORE,
    "cli": CORE
    | {"settings", "telemetry", "background", "listener", "processes", "service", "__init__", "doctor", "archive"},
    "__main__": frozenset({"cli"}),
}

#: Who may import a part that one place alone is to know. `brokers/database` is one module of a room.
_SQL = frozenset(
    {"schema", "dialects", "store", "keys", "breakers", "backlog", "lookups", "maintenance", "migrations"}
    | {"brokers/database"}
)
OWNERS: dict[str, frozenset[str]] = {
    "sqlalchemy": _SQL,
    "alembic": _SQL,
    "sqlite3": _SQL,
    "starlette": frozenset({"web"}),
    "offapi": frozenset({"web"}),
    "redis": frozenset({"redis_client", "cache", "brokers"}),
    "aio_pika": frozenset({"brokers"}),
    "uvicorn": frozenset({"connections", "listener"}),
}

#: Rooms that count money or decide: no float may come to be here.
EXACT_ROOMS = CORE

#: Where everything may be caught and not raised again: "module:function" -> the reason why.
ALLOWED_LAST_RESORT: dict[str, str] = {
    "committer:Committer.keep_house": "upkeep that fails once must not end for good; a minute later it goes on",
    "applier:Applier._take": "what fails in an unforeseen way is tried by itself; its neighbours go on",
    "applier:Applier._take_alone": "what fails so again and again is put aside; what comes after it goes on",
    "worker:Worker._claim": "a worker that is gone claims nothing ever again; it is logged and tried again",
    "committer:Committer._run": "everyone in a broken batch must hear of it, and the next one must be carried out",
    "worker:Worker._attempt": "a stage that fails in an unforeseen way is counted, so that its order gets parked",
    "web/__init__:_Application.__call__": "a bug answers its own request with a 500; it is logged with its id",
}


class Module(NamedTuple):
    """One source file: its place in the package, as in `web/orders`, and what it says."""

    place: str
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        return self.place.split("/")[0]


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
ROOMS = frozenset(module.room for module in MODULES)


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


def imported_rooms(module: Module) -> Iterator[tuple[int, str]]:
    """Give the line and the room of everything of ours that a module imports from another room."""
    for line, name in imported_names(module):
        top, _, rest = name.partition(".")
        room = rest.split(".")[0]
        if top != "expediter":
            continue
        if room not in ROOMS | ALLOWED.keys():
            room = "__init__"
        if room != module.room:
            yield line, room


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


def test_every_room_is_in_the_table() -> None:
    """Every top-level module and folder of the package has its line in ALLOWED."""
    unknown = sorted(ROOMS - ALLOWED.keys())
    assert not unknown, f"add these rooms to ALLOWED, with the rooms that each may import: {unknown}"


def test_the_arrows_form_no_circle() -> None:
    """Outside the core, no room reaches itself by the arrows of ALLOWED."""
    arrows = {room: allowed - CORE for room, allowed in ALLOWED.items() if room not in CORE}
    assert set(TopologicalSorter(arrows).static_order()) == ALLOWED.keys() - CORE


def test_imports_follow_the_arrows() -> None:
    """A room imports only the rooms that its line in ALLOWED names."""
    strangers = [
        f"{module.place}.py:{line} imports {room}; {module.room} may import only {sorted(allowed)}"
        for module in MODULES
        if (allowed := ALLOWED.get(module.room)) is not None
        for line, room in imported_rooms(module)
        if room not in allowed
    ]
    assert not strangers, "\n".join(strangers)


def test_a_part_is_known_to_its_owners_alone() -> None:
    """The SQL toolkit, the web toolkit and the web server are each imported by the rooms in OWNERS only."""
    strangers = [
        f"{module.place}.py:{line} imports {name}; only {sorted(owners)} may"
        for module in MODULES
        for line, name in imported_names(module)
        if (owners := OWNERS.get(name.split(".")[0])) is not None
        if module.room not in owners and module.place not in owners
    ]
    assert not strangers, "\n".join(strangers)


def test_only_the_service_opens_things() -> None:
    """Outside the room that defines it, an open_* function is named by the service alone."""
    homes = {
        named.name: module.room
        for module in MODULES
        for named in functions_and_classes(module)
        if named.name.startswith("open_") and module.room != "service"
    }
    strangers = []
    for module in MODULES:
        if module.room == "service":
            continue
        for node in ast.walk(module.tree):
            match node:
                case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
                    if homes.get(name, module.room) != module.room:
                        strangers.append(f"{module.place}.py:{node.lineno} uses {name}; only service may")
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
        if not (module.place.startswith("migrations/versions/") and name in {"upgrade", "downgrade"})
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


def test_money_is_never_a_float() -> None:
    """No float is made, and no float literal written, where money is counted or an order decided."""
    floats = [
        f"{module.place}.py:{node.lineno} {ast.unparse(node)}"
        for module in MODULES
        if module.room in EXACT_ROOMS
        for node in ast.walk(module.tree)
        if (isinstance(node, ast.Call) and ast.unparse(node.func) == "float")
        or (isinstance(node, ast.Constant) and isinstance(node.value, float))
    ]
    assert not floats, "\n".join(floats)
