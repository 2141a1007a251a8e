"""Run a target of this folder under libFuzzer for a bounded time and say what it covered.

    python -m tests.support.fuzz.torch_file --seconds 600
    python -m tests.support.fuzz.nifti --seconds 600 --corpus /tmp/nifti

It needs `pip install atheris` (not a dependency of the project). An input for which a target
raises, takes over `SLOW` seconds or more memory than `MEMORY_MIB` is kept as `crash-*`, `timeout-*`
or `oom-*` beside the corpus; the program then ends with 1. `--corpus` keeps what was learned.
"""

import argparse
import importlib
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SLOW = 5  # seconds for one input; the slowest of a normal run takes hundredths
MEMORY_MIB = 1024  # of the whole process, which starts with 100 to 200
_FOUND = ("crash-", "timeout-", "oom-")


class Target(NamedTuple):
    """What is fuzzed.

    run: takes the bytes of an input, raises where the reader breaks its promise. seeds: inputs to
    start from. words: byte strings to build inputs of. longest: bytes of an input.
    """

    run: Callable[[bytes], None]
    seeds: list[bytes]
    words: list[bytes]
    longest: int


def main(target: Callable[[], Target], name: str, modules, guides) -> int:
    """The command line of the target module `name`.

    modules: whose coverage is measured; guides: further ones whose branches guide the search.
    `target` imports both itself, so that they can be imported with their branches counted.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=target.__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", help="folder of inputs to go on from; default: a fresh one")
    parser.add_argument("--inputs", nargs="+", help="only run these files, without atheris")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inputs:
        for file in given.inputs:
            target().run(Path(file).read_bytes())
            print(f"{file}: the reader kept its promise")
        return 0
    if given.inside:
        return _fuzz(target, [*modules, *guides], Path(given.corpus), given.seconds)
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(given.corpus or scratch) / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(target().seeds):
            (corpus / f"seed-{number}").write_bytes(seed)
        command = [sys.executable, "-m", name, "--inside", "--corpus", str(corpus)]
        code = subprocess.run([*command, "--seconds", str(given.seconds)], check=False).returncode
        found = sorted(f for f in corpus.parent.iterdir() if f.name.startswith(_FOUND))
        print(_coverage(target(), modules, corpus))
        for file in found:
            kept = Path(file.name).absolute()
            kept.write_bytes(file.read_bytes())
            print(f"found {kept}; see it again with --inputs {kept.name}")
        return 1 if found or code else 0


def _fuzz(target: Callable[[], Target], counted: list[str], corpus: Path, seconds: int) -> int:
    try:
        import atheris
    except ImportError:
        print("error: atheris is not installed; run pip install atheris", file=sys.stderr)
        return 2
    for module in counted:
        sys.modules.pop(module, None)  # Python itself may have imported it
    with atheris.instrument_imports(include=counted, enable_loader_override=False):
        for module in counted:
            importlib.import_module(module)
    plan = target()
    words = corpus.parent / "words"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in plan.words))
    options = [
        f"-max_total_time={seconds}",
        f"-timeout={SLOW}",
        f"-rss_limit_mb={MEMORY_MIB}",
        f"-max_len={plan.longest}",
        f"-dict={words}",
        f"-artifact_prefix={corpus.parent}/",
        "-print_final_stats=1",
        "-seed=1",
    ]
    atheris.Setup([sys.argv[0], str(corpus), *options], plan.run)
    atheris.Fuzz()
    return 0


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def _coverage(target: Target, names, corpus: Path) -> str:
    """Share of the lines of the measured modules that the corpus runs through."""
    modules = [importlib.import_module(name) for name in names]
    files = {module.__file__ for module in modules}
    seen: set[tuple[str, int]] = set()

    def trace(frame, event, argument):
        if frame.f_code.co_filename not in files:
            return None
        seen.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    inputs = sorted(corpus.iterdir())
    sys.settrace(trace)
    try:
        for file in inputs:
            target.run(file.read_bytes())
    finally:
        sys.settrace(None)
    lines = [f"{len(inputs)} inputs in the corpus"]
    for module in modules:
        every = _lines_of_functions(module)
        ran = {line for file, line in seen if file == module.__file__} & every
        missed = ", ".join(map(str, sorted(every - ran))) or "none"
        share = f"{len(ran)} of {len(every)} lines of functions"
        lines.append(f"{module.__name__}: {share}; not reached: {missed}")
    return "\n".join(lines)


def _lines_of_functions(module) -> set[int]:
    source = Path(module.__file__).read_text(encoding="utf-8")
    pending, lines = [compile(source, module.__file__, "exec")], set()
    while pending:
        code = pending.pop()
        inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        pending += inner
        if code.co_name != "<module>" and code.co_flags & 2:  # 2: a function, not a class body
            lines |= {line for *_, line in code.co_lines() if line} - {code.co_firstlineno}
    return lines
