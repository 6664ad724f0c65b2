"""Code that decides answers and bears no version of its own: classes of third parties, as digests of their files."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

VERSIONED = {"builtins", "torch", "torchvision", "transformers", "tokenizers", "peft", "accelerate", "bitsandbytes"}
"""Packages that change with their version only, beside `transformers_modules`, which is somebody's file."""
INSTALLED = ("site-packages", "dist-packages")


def code_digest(classes: Iterable[type], versioned: Iterable[str] = ("vlmfix",)) -> str | None:
    """A digest of the files of some classes and their bases, and of the modules beside these files that they use;
    `None` where all are of `VERSIONED` packages. A class without a file counts by its own code."""
    digests: set[str] = set()
    known = VERSIONED | set(versioned)
    for cls in set(classes):
        for base in cls.__mro__:
            if base.__module__.partition(".")[0] in known:
                continue
            module = sys.modules.get(base.__module__)
            files = _files(module) if module is not None else set()
            digests |= {_of_bytes(file.read_bytes()) for file in files} or {_of_bytes(_code_of(base))}
    return _of_bytes("".join(sorted(digests)).encode()) if digests else None


def file_digest(text: str) -> str | None:
    """A digest of the file that a text names by its path, or by `package.module:function`; `None` for other texts."""
    try:
        if Path(text).is_file():
            return _of_bytes(Path(text).read_bytes())
        module, colon, _ = text.partition(":")
        spec = importlib.util.find_spec(module) if colon and module.replace(".", "").isidentifier() else None
        return _of_bytes(Path(spec.origin).read_bytes()) if spec is not None and spec.origin else None
    except (OSError, ValueError, ImportError):  # longer than a path may be, no such package
        return None


def _files(module: ModuleType) -> set[Path]:
    """The file of a module, and those of the modules of its package or folder that it uses, and so on."""
    files: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        current = waiting.pop()
        file = getattr(current, "__file__", None)
        if current.__name__ in files or not file or not Path(file).is_file():
            continue
        files[current.__name__] = Path(file)
        waiting += [other for other in _used(current) if _is_beside(other, current)]
    return set(files.values())


def _used(module: ModuleType) -> Iterator[ModuleType]:
    """Modules that a module's names come from, but not what hangs on a package since somebody else imported it."""
    for value in list(vars(module).values()):
        is_module = inspect.ismodule(value)
        name = value.__name__ if is_module else getattr(value, "__module__", None)
        if isinstance(name, str) and name in sys.modules and not (is_module and name.startswith(f"{module.__name__}.")):
            yield sys.modules[name]


def _is_beside(other: ModuleType, module: ModuleType) -> bool:
    if other.__name__.partition(".")[0] == module.__name__.partition(".")[0]:
        return True
    folder = Path(str(module.__file__)).parent
    return folder.name not in INSTALLED and Path(getattr(other, "__file__", None) or "").parent == folder


def _code_of(cls: type) -> bytes:
    """Of a class that was typed into a console or notebook: its source, or what became of it."""
    try:
        return inspect.getsource(cls).encode()
    except (OSError, TypeError):
        parts = [f"{name}={_plain(value)}" for name, value in sorted(vars(cls).items()) if name not in _VOLATILE]
        return "\n".join([cls.__qualname__, *parts]).encode()


_VOLATILE = {"__dict__", "__weakref__", "__firstlineno__", "__static_attributes__"}


def _plain(value: Any) -> str:
    """Code and values, without addresses in memory."""
    code = value if isinstance(value, CodeType) else getattr(getattr(value, "__func__", value), "__code__", None)
    if code is None:
        return value.__qualname__ if hasattr(value, "__qualname__") else f"{type(value).__name__} {value!s}"[:999]
    constants = [_plain(constant) for constant in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {constants}"


def _of_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
