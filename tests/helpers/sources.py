"""Reads source code, for the rules of test_codebase.py: modules, what they import, C without its comments."""

import ast
import re

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def modules(package):
    """{dotted name below the package: path} of modules, and of an extension by its stub; "__init__" is the package."""
    found = {}
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.pyi")]):
        parts = path.relative_to(package).with_suffix("").parts
        if parts[0] != "examples":  # a wheel has them inside
            found.setdefault(".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__", path)
    return found


def rule_of(name, table):
    """The entry of a module in a table: its own, or else that of the innermost folder around it that has one."""
    while name and name not in table:
        name = name.rpartition(".")[0]
    return table.get(name)


def lies_in(name, places):
    """Whether a module is one of these, or in a folder that is."""
    return any(name == place or name.startswith(place + ".") for place in places)


def import_statements(node, at_once=True):
    """(statement, whether it runs when the module is imported) of every import below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, at_once
        elif isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from import_statements(child, False)
        else:
            yield from import_statements(child, at_once and not isinstance(child, FUNCTIONS))


def base_of(statement, name, path):
    """The parts of the module that `from ... import` names, absolute but for "bnfast"; None outside bnfast."""
    parts = statement.module.split(".") if statement.module else []
    if not statement.level:
        return parts[1:] if parts[0] == "bnfast" else None
    package = [] if name == "__init__" else name.split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    return package[: len(package) + 1 - statement.level] + parts


def origin(found, base, name):
    """The module that `from base import name` takes the name from: through packages that have it from elsewhere."""
    inner, holder = ".".join([*base, name]), ".".join(base) or "__init__"
    if inner in found:
        return inner
    if holder in found and found[holder].name == "__init__.py":
        for statement, _ in import_statements(ast.parse(found[holder].read_text(encoding="utf-8"))):
            if isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    further = base_of(statement, holder, found[holder])
                    if (alias.asname or alias.name) == name and further is not None:
                        return origin(found, further, alias.name)
    return holder


def imports(found, name):
    """({modules of bnfast}, {other top-level packages}, {those of them imported when the module is}) of a module."""
    own, others, at_once = set(), set(), set()
    for statement, now in import_statements(ast.parse(found[name].read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Import):
            tops = {alias.name.partition(".")[::2] for alias in statement.names}
            own |= {rest or "__init__" for top, rest in tops if top == "bnfast"}
            outside = {top for top, _ in tops if top != "bnfast"}
        else:
            base = base_of(statement, name, found[name])
            own |= {origin(found, base, alias.name) for alias in statement.names} if base is not None else set()
            outside = {statement.module.partition(".")[0]} if base is None else set()
        others |= outside
        at_once |= outside if now else set()
    return own - {name}, others, at_once


def circle(graph):
    """A way from a node of {node: nodes} back to itself, None if there is none."""
    done = set()

    def walk(node, above):
        if node in above:
            return (*above[above.index(node) :], node)
        if node in done:
            return None
        done.add(node)
        return first(walk(other, (*above, node)) for other in sorted(graph.get(node, ())))

    def first(ways):
        return next(filter(None, ways), None)

    return first(walk(node, ()) for node in sorted(graph))


def c_code(path):
    """A C source without its comments and, except after #include, its strings."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = text.splitlines()
    return "\n".join(line if "include" in line else re.sub(r'"[^"]*"', '""', line) for line in lines)


def cython_code(path):
    """A Cython source without its comments and docstrings."""
    return re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def files(folder, *endings):
    """All files below a folder with one of these endings, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix in endings)


def calls(folder):
    """{name of a C file: {names of those that define a function it uses}} of a folder."""
    code = {path.name: c_code(path) for path in files(folder, ".c")}
    definition = re.compile(r"^\w[\w *]*?\b(bnfast_\w+)\([^;{}]*\)\s*\{", re.MULTILINE)
    home = {name: file for file, text in code.items() for name in definition.findall(text)}
    return {
        file: {home[name] for name in re.findall(r"\bbnfast_\w+", text) if name in home} - {file}
        for file, text in code.items()
    }


def includes(folder):
    """{name of a C file: {names of the files of the folder that it includes}}."""
    return {
        path.name: set(re.findall(r'#\s*include\s*"(?:\w+/)*([\w.]+)"', c_code(path)))
        for path in files(folder, ".c", ".h")
    }
