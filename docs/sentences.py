"""The page "When something is wrong":

every sentence with which the package stops or warns, collected from its code, so that a reader can
search for what they saw.
"""

import ast
import json
import re


def template(node):
    "The text of a string expression, with … for what is filled in; None where it is none."
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) or "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = template(node.left), template(node.right)
        return None if left is None and right is None else (left or "…") + (right or "…")
    return None


# how the docstring of a function begins that words a part of a sentence
REASONS = ("Why", "What is wrong", "Which", "Say why", "Say what is wrong", "Return why")
PAGES = (
    "train",
    "evaluate",
    "ablation",
    "figures",
    "robustness",
    "benchmark",
)  # what papermill runs


def raised(node):
    "The text of an exception that is raised or returned; None where it has none."
    if (
        isinstance(node, ast.Call)
        and node.args
        and getattr(node.func, "id", "").endswith(("Error", "Exit"))
    ):
        return template(node.args[-1])  # of an OSError the first is its number
    return None


def sentences(code):
    """What a module raises, the reasons that it words apart, and what the doctor finds:

    (sentence, what to do or ""), each once, in the order of the code.
    """
    found = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Raise):
            found.setdefault((raised(node.exc), ""))
        elif isinstance(node, ast.Return):
            found.setdefault((raised(node.value), ""))
        elif isinstance(node, ast.FunctionDef) and (ast.get_docstring(node) or "").startswith(
            REASONS
        ):
            for part in ast.walk(node):
                if isinstance(part, ast.Return):
                    found.setdefault((template(part.value), ""))
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", "") == "finding"
            and len(node.args) == 4
        ):
            found.setdefault((template(node.args[1]), template(node.args[3]) or ""))
    return [
        (text, advice)
        for text, advice in found
        if text and re.search(r"\w\w.* .*\w\w", text.replace("…", ""))
    ]


def cell(text):
    "A text as a cell of a Markdown table, without meaning to Markdown."
    text = re.sub(r"…(…|\s*…)*", "…", " ".join(text.split()))
    return re.sub(r"([\\`*_{}\[\]<>()#+!|$~])", r"\\\1", text)


def programs(root):
    "(name, code) of each notebook that can stop with a sentence of its own, by its path in nbs/."
    for file in sorted((root / "reidnb").rglob("*.py")):
        code = file.read_text(encoding="utf-8")
        notebook = re.search(r"File to edit: [./]*/nbs/(.+)\.ipynb", code)
        if notebook:
            yield notebook[1], code
    for name in PAGES:
        file = root / "nbs" / f"{name}.ipynb"
        if file.is_file():
            cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
            yield name, "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


def section(notebook, rows):
    "What a notebook says, as a table; a second column where some of it has advice beside it."
    lines = [f"### {notebook}", "", f"From [{notebook}]({notebook}.ipynb).", ""]
    if any(advice for _, advice in rows):
        lines += ["| what is said | what to do |", "|---|---|"]
        lines += [f"| {cell(text)} | {cell(advice)} |" for text, advice in rows]
    else:
        lines += ["| what is said |", "|---|"]
        lines += [f"| {cell(text)} |" for text, _ in rows]
    return "\n".join(lines)


def guide(root):
    "The common cases, which people wrote, with links as from the site's top."
    file = root / "docs" / "guide" / "when-something-is-wrong.md"
    if not file.is_file():
        return "# When something is wrong\n\n"
    text = file.read_text(encoding="utf-8")
    return text.replace("](../../nbs/", "](").replace("](../../", "](") + "\n"


def page(root):
    "The page in Markdown; an empty text where nothing is ever said."
    parts = []
    for notebook, code in sorted(programs(root)):
        rows = sentences(code)
        if rows:
            parts.append(section(notebook, rows))
    if not parts:
        return ""
    head = guide(root) + (
        "## Every sentence\n\n"
        "Every sentence with which this package stops or warns, "
        "with … for what is filled in: a name, a number, a file. "
        "Search this page, or the site, for a few words of what you saw. "
        "The page is made from the code that raises them. "
        "What is said ends with what to do, unless a second column says it. "
        "A sentence that helps too little is a fault of ours.\n"
    )
    return head + "\n" + "\n\n".join(parts) + "\n"
