"""The page "Every public name":

what `import reidnb` offers, with each signature as it stands in the code, the first line of the
docstring, and the notebook that explains it.
"""

import ast


def offered(root):
    "Module -> names, as the table of `reidnb/__init__.py` says; empty where there is no package."
    file = root / "reidnb" / "__init__.py"
    if not file.is_file():
        return {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "OFFERED":
            table = ast.literal_eval(node.value)
            return {module: names.split() for module, names in table.items()}
    return {}


ASSIGNMENTS = (ast.Assign, ast.AnnAssign)  # NAME = …, NAME: TYPE = …


def assigned(node):
    "The names that an assignment gives a value."
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [ast.unparse(target) for target in targets]


def find(root, module, name):
    "The code of the module that defines a name, and where: a function, a class or an assignment."
    path = module.replace(".", "/")
    code = (root / "reidnb" / f"{path}.py").read_text(encoding="utf-8")
    for node in ast.parse(code).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return code, node
        if isinstance(node, ASSIGNMENTS) and name in assigned(node):
            return code, node
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            parents = ["reidnb", *module.split(".")][: -node.level] if node.level else []
            defined_in = ".".join([*parents, node.module])
            return find(root, defined_in.removeprefix("reidnb."), name)
    raise LookupError(f"reidnb.{module} defines no {name}: correct OFFERED in nbs/api.ipynb")


def without_docstring(node):
    "What stands in a function or class after its docstring."
    return node.body[1:] if ast.get_docstring(node) else node.body


def lines_between(code, first, last):
    "The lines of a module from one number to another, both included, counted from 1."
    return "\n".join(code.splitlines()[first - 1 : last])


def head(code, node):
    "The lines of a function before its body, with the comments on its parameters."
    return lines_between(code, node.lineno, node.body[0].lineno - 1).rstrip()


def signature(code, node):
    """How a name is used.

    A function with its parameters, a dataclass with its fields, another class with what makes one
    of it, a constant with its value.
    """
    if isinstance(node, ast.FunctionDef):
        return head(code, node)
    if isinstance(node, ASSIGNMENTS):
        return lines_between(code, node.lineno, node.end_lineno)
    parts = [lines_between(code, node.lineno, node.lineno)]
    body = without_docstring(node)
    for part in body:
        if isinstance(part, ast.AnnAssign):
            parts.append(lines_between(code, part.lineno, part.end_lineno))
        elif isinstance(part, ast.FunctionDef) and part.name == "__init__":
            parts.append(head(code, part))
    return "\n".join(parts)


def summary(node):
    "The first line of a docstring; empty for what has none."
    if isinstance(node, ASSIGNMENTS):
        return ""
    return (ast.get_docstring(node) or "").split("\n")[0]


def section(root, module, names):
    "The names of one module."
    path = module.replace(".", "/")
    lines = [f"## {module}", "", f"Explained and tested in [{path}]({path}.ipynb)."]
    for name in names:
        code, node = find(root, module, name)
        lines += ["", f"### {name}", ""]
        if summary(node):
            lines += [summary(node), ""]
        lines += ["```python", signature(code, node), "```"]
    return "\n".join(lines)


def page(root):
    "The page in Markdown; an empty text where there is no package."
    modules = offered(root)
    if not modules:
        return ""
    n_names = sum(len(names) for names in modules.values())
    top = (
        "# Every public name\n\n"
        f"`import reidnb` offers these {n_names} names. "
        "A module is loaded when one of its names is first used. "
        "The comment beside a parameter says its shape, its unit or its range.\n"
    )
    parts = [section(root, module, names) for module, names in modules.items()]
    return top + "\n" + "\n\n".join(parts) + "\n"
