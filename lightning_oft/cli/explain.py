"""What jsonargparse says on many lines, said in one: the key, what is wrong with it, the nearest that would be right.

jsonargparse reports an unknown key, class or type as a tree of alternatives ("Does not validate against any of the Union
subtypes ..."), after the whole usage. The tree is read here rather than replaced, so that its checks stay the only ones.
"""

import ast
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from lightning_oft.cli.errors import suggestion

_SPEC = {"class_path", "init_args", "dict_kwargs"}  # what jsonargparse reads in the place of an object


@dataclass(frozen=True)
class Complaint:
    """One message of the parser, taken apart."""

    text: str
    """The whole message."""
    known_keys: list[str]
    """Every key the parser has, dotted."""
    config_files: list[str] = field(default_factory=list)
    """The values of --config, in order."""
    class_names: list[str] = field(default_factory=list)
    """Names of classes that may not be imported yet."""

    @property
    def branch(self) -> str:
        """The alternative that failed deepest inside a class: what the others say is `Expected a None` and the like."""
        lines = self.text.splitlines()
        start = next((i for i, line in enumerate(lines) if "Problem with given class_path" in line), None)
        if start is None:
            return self.text
        depth = len(lines[start]) - len(lines[start].lstrip())
        end = next(
            (
                i
                for i, line in enumerate(lines)
                if i > start and line.strip() and len(line) - len(line.lstrip()) <= depth
            ),
            len(lines),
        )
        return "\n".join(lines[start:end])

    @property
    def outer_key(self) -> str:
        """The key the parser names, without the command in front of it."""
        found = re.search(r'Parser key "([^"]+)"|\A(--[\w.]+):', self.text)
        return found[1] or found[2] if found else ""

    @property
    def key(self) -> str:
        """The innermost key, spelled as in YAML: `model.init_args.learning_rate`."""
        inner = re.findall(r'Parser key "([^"]+)"', self.branch) if self.branch != self.text else []
        return ".init_args.".join([self.outer_key, *inner]) if inner else self.outer_key

    @property
    def class_path(self) -> str:
        """The innermost class that had a problem with its arguments."""
        called = re.search(r"callable class: Option .*Namespace\(class_path='([^']+)'", self.branch)
        found = re.findall(r"Problem with given class_path '([^']+)'", self.branch)
        return called[1] if called else found[-1] if found else ""

    @property
    def value(self) -> object:
        """The value given, where the message repeats it."""
        found = re.search(r"(?:Given value|Got value): (.*)\Z", self.text, re.DOTALL)
        try:
            return ast.literal_eval(found[1]) if found else None
        except (ValueError, SyntaxError):
            return found[1].strip() if found else None


def explain(complaint: Complaint) -> str:
    """One line for `complaint`; the first explanation that fits, else the message without its line breaks."""
    explanations: list[Callable[[Complaint], str | None]] = [
        _config_file,
        _missing,
        _unknown_key,
        _misplaced_key,
        _unknown_argument,
        _unknown_class,
        _wrong_type,
    ]
    return next((line for e in explanations if (line := e(complaint))), " ".join(complaint.text.split()))


def _config_file(complaint: Complaint) -> str | None:
    if found := re.search(r'Parser key "config": (?:File does not exist|.*not.*): \'([^\']+)\'', complaint.text):
        path = Path(found[1])
        around = path.parent.glob("*.y*ml") if path.parent.is_dir() else ()
        return f"--config: no file {found[1]!r}{suggestion(found[1], map(str, around)) or '; give the path of a YAML file'}"
    if re.match(r"Problems parsing config|Unexpected config", complaint.text):
        where = complaint.config_files[-1] if complaint.config_files else "--config"
        place = re.search(r"line \d+, column \d+", complaint.text)
        detail = "not a mapping of keys to values" if complaint.text.startswith("Unexpected") else "not valid YAML"
        return f"{where}: {detail}{f' at {place[0]}' if place else ''}"
    return None


def _missing(complaint: Complaint) -> str | None:
    found = re.search(r"arguments are required: (.*)", complaint.text, re.DOTALL)
    if not found:
        return None
    # The class a key belongs to is looked for in the branch; at the top the key starts with the command's name.
    if complaint.class_path:
        return f"{complaint.outer_key}: {_short(complaint.class_path)} needs {found[1].splitlines()[0]}"
    keys = sorted(key.partition(".")[2] for key in found[1].split(", "))
    options = " ".join(f"--{key} CLASS" for key in keys)
    return f"missing {' and '.join(keys)}: give them in a file with --config FILE, or as {options}"


def _unknown_key(complaint: Complaint) -> str | None:
    found = re.search(
        r"does not accept option '([^']+)'\s*$|unrecognized arguments: (\S+)|Option '([^']+)' is not accepted before",
        complaint.text,
    )
    if not found:
        return None
    if not (found[2] or "--").startswith("-"):
        return f"unexpected argument {found[2]!r}: a value belongs to an option, as in --trainer.max_epochs 3"
    key = (found[1] or found[2] or found[3]).lstrip("-").split("=")[0]
    head = key.partition(".")[0]
    groups = {known.partition(".")[0] for known in complaint.known_keys}
    if head not in groups and "." in key and (hint := suggestion(head, groups)):
        return f"unknown key {key!r}{hint}"
    return f"unknown key {key!r}{suggestion(key, complaint.known_keys)}"


def _misplaced_key(complaint: Complaint) -> str | None:
    """`model.pretrained` beside `class_path` where `model.init_args.pretrained` was meant, or a mistyped `init_args`."""
    value = complaint.value
    extra = sorted(set(value) - _SPEC) if isinstance(value, dict) else []
    if not extra or not isinstance(value, dict) or not set(value) & _SPEC:
        return None
    arguments = _parameters(_resolve(str(value.get("class_path", "")), _bases(complaint.text)))
    valid = [*_SPEC, *(f"init_args.{name}" for name in arguments)]
    return f"unknown key '{complaint.outer_key}.{extra[0]}'{suggestion(str(extra[0]), valid)}"


def _unknown_argument(complaint: Complaint) -> str | None:
    found = re.search(r"Option '([^']+)' is not accepted", complaint.branch)
    if not found or not complaint.class_path:
        return None
    arguments = _parameters(_resolve(complaint.class_path, []))
    hint = suggestion(found[1], arguments) or (f"; it takes {', '.join(arguments)}" if arguments else "")
    return f"unknown key '{complaint.key}.init_args.{found[1]}' of {_short(complaint.class_path)}{hint}"


def _unknown_class(complaint: Complaint) -> str | None:
    found = re.search(
        r"Expected a dot import path string: (\S+)|Import path (\S+) does not correspond to|"
        r"given class_path '([^']+)':\s+(?:module '[^']+' has no attribute|No module named|type object)|"
        r"callable class: (?:module '[^']+' has no attribute|No module named).*class_path='([^']+)'",
        complaint.text,
    )
    # A word in the place of a number is no class, although jsonargparse has looked for one (`lr` may be a tensor).
    if not found or (found[1] and re.search(r"Expected a <class '(int|float|str)'>", complaint.branch)):
        return None
    given = next(filter(None, found.groups()))
    bases = _bases(complaint.branch) or _bases(_USUAL.get(complaint.key.rpartition(".")[2], ""))
    bases = bases or _bases(complaint.text)
    known = [*complaint.class_names, *(cls.__name__ for base in bases for cls in _subclasses(base))]
    kind = f" is not a {' or '.join(base.__name__ for base in bases)}" if found[2] and bases else ""
    what = f"{given!r}{kind}" if kind else f"no class {given!r}"
    return f"{complaint.key}: {what}{suggestion(given.rpartition('.')[2], known)}"


_USUAL = {
    "optimizer": "Subtypes: torch.optim.Optimizer",
    "lr_scheduler": "Subtypes: torch.optim.lr_scheduler.LRScheduler",
}


def _wrong_type(complaint: Complaint) -> str | None:
    text = complaint.branch
    if choices := re.findall(r"Expected a typing\.Literal\[([^\]]*)\]", text):
        names = [name.strip(" '\"") for name in ",".join(choices).split(",")]
        hint = suggestion(str(complaint.value), names) or f"; one of {', '.join(names)}"
        return f"{complaint.key}: {_given(text)} is not a valid choice{hint}"
    types = [_TYPES.get(name, _short(name)) for name in re.findall(r"Expected a <class '([^']+)'>", text)]
    if not types or not complaint.outer_key:
        return None
    return f"{complaint.key}: expected {' or '.join(dict.fromkeys(types))}, got {_given(text)}"


_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a string",
    "NoneType": "null",
    "list": "a list",
    "dict": "a mapping",
    "collections.abc.Iterable": "a list",
}


def _given(text: str) -> str:
    found = re.search(r"(?:Given value|Got value): ([^\n]*)", text)
    value = found[1].partition(". Got value:")[0] if found else "nothing"
    return repr(value if len(value) <= 60 else value[:57] + "...")


def _short(class_path: str) -> str:
    return class_path.rpartition(".")[2]


def _bases(text: str) -> list[type]:
    """The classes that the message says a value could be an instance of."""
    said = re.search(r"Subtypes: (.*)|Type typing\.Callable\[\[.*?\],(.*) expects", text)
    names = re.findall(r"\b((?:[a-z_]\w*\.)+[A-Z]\w*)", (said[1] or said[2]) if said else "")
    found = [_resolve(name, []) for name in dict.fromkeys(names) if not name.startswith(("typing.", "collections."))]
    return [cls for cls in found if isinstance(cls, type)]


def first_alternative(text: str) -> str:
    """What was wrong with the first of a union's alternatives: an error of the class's own, raised as it was made."""
    _, union, rest = text.partition("Errors:\n")
    if not union:
        return text
    first, *others = rest.splitlines()
    indent = len(first) - len(first.lstrip())
    more = itertools.takewhile(lambda line: len(line) - len(line.lstrip()) > indent, others)
    return first_alternative("\n".join([first.strip().removeprefix("- "), *more]))


def _resolve(class_path: str, bases: Iterable[type]) -> object:
    """The class called `class_path`: an import path, or the bare name of a subclass of `bases`. None if there is none."""
    module, _, name = class_path.rpartition(".")
    if not module:
        return next((cls for base in bases for cls in _subclasses(base) if cls.__name__ == name), None)
    try:
        return getattr(import_module(module), name, None)
    except ImportError:
        return None


def _subclasses(base: type) -> Iterator[type]:
    """`base` and every class below it that is imported and public."""
    seen, stack = {base}, [base]
    while stack:
        cls = stack.pop()
        if not cls.__name__.startswith("_"):
            yield cls
        # `type.__subclasses__` rather than the method: a metaclass in the list would need an argument.
        children: list[type] = type.__subclasses__(cls)
        below = [child for child in children if child not in seen]
        seen.update(below)
        stack += below


def _parameters(cls: object) -> list[str]:
    """The arguments `cls` takes, with those its parents take where it forwards `**kwargs`."""
    names: list[str] = []
    for parent in inspect.getmro(cls) if isinstance(cls, type) else ():
        init = vars(parent).get("__init__")
        parameters = inspect.signature(init).parameters.values() if init else ()
        names += [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return [name for name in dict.fromkeys(names) if name != "self"]
