"""Run the commands of some pages one after the other, in one process and in a copy of the project, at a small size.

``walk`` makes the copy and starts ``python -m tests.docs.walk`` in it, so that the many imports are paid once. Settings
are added for size only (few items, short texts, one task, seed, cluster count and sparsity of a table, narrow models
with the real number of heads, and with the real vocabulary where no folder is read), and for a CPU without a network
(``machine.py``): data from files, weights in float32, and one job after the other where the command starts several
processes.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from unittest import mock

import yaml

from tests.docs.coverage import elsewhere
from tests.docs.pages import REPOSITORY, blocks, commands, split

PARTS = ("chai", "conf", "experiments", "analysis", "results/paper", "results/published", "examples", "docs", "run.py")
TIMEOUT_S = 870  # much more than the walk takes, for a machine that is busy with other things
MICROWORLD = "experiments/microworld"
#: Settings of each experiment that make it small; those of the command itself come after them.
SIZES = {
    "accuracy": [],
    "latency": ["experiment.lengths=[16]", "experiment.rounds=1"],
    "memory": ["experiment.lengths=[16]", "experiment.steps=2"],
    "perplexity": ["experiment.window=16", "experiment.stride=8", "experiment.tokens=40"],
    "profile": ["profile.history=6", "profile.history_samples=2"],
    "ablations": ["experiment.samples=8", "experiment.sample_tokens=8", "experiment.domains=[docs]"],
    "train_dejavu": ["experiment.steps=2", "experiment.held_out=1", "experiment.checkpoint_every=1"],
    "pretrain_tiny": ["experiment.steps=3", "experiment.sequence_length=32", "experiment.first_phase=1"],
}
#: Settings that replace those of the command.
FORCED = {
    "profile": ["profile.samples=3", "profile.tokens=24", "profile.sensitivity_tokens=8"],
    "accuracy": ["limit=2", "batch_size=4"],
    "train_dejavu": [
        "experiment.batch_size=2",
        "experiment.sequence_length=16",
        "experiment.validation=1",
        "experiment.bottleneck=16",
    ],
    "pretrain_tiny": ["experiment.batch_size=2"],
    "ablations": ["experiment.texts=1", "experiment.tokens=24", "experiment.first_scored=8"],
}


#: Tasks whose items are made, not read.
MADE = ("passkey", "needle")


@dataclass
class Outcome:
    """How a command ended: its exit code, its output, and the seconds of processor time that it took."""

    command: str
    code: int
    output: str
    seconds: float


@dataclass
class Walk:
    """The copy of the project with all that the commands left, how they ended, and those that are tested elsewhere."""

    project: Path
    outcomes: list[Outcome]
    more: list[Outcome]  # of commands that are not of the pages
    elsewhere: list[str]

    @property
    def failed(self) -> list[str]:
        """Each command that ended with another exit code than 0, with the end of its output."""
        ended = [*self.outcomes, *self.more]
        return [f"{one.command}\nexit code {one.code}\n{one.output[-2000:]}" for one in ended if one.code]

    def properties(self) -> list[tuple[str, list[str]]]:
        """Return what the summary of the test run counts."""
        return [("commands run", [one.command for one in self.outcomes]), ("commands elsewhere", self.elsewhere)]


def walk(pages: Sequence[Path], folder: Path, more: Sequence[str] = ()) -> Walk:
    """Write the files of the pages into a copy of the project in ``folder``, and run all their commands there.

    The commands ``more`` are run after those of the pages.
    """
    project = folder / "project"
    for part in PARTS:
        source, target = REPOSITORY / part, project / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)  # with __pycache__, where the compiled K-means is
        else:
            shutil.copy(source, target)
    for path in project.glob("conf/paper/*.yaml"):
        # One of several seeds, cluster counts and sparsities.
        path.write_text(re.sub(r"((?:seed|clusters|sparsity)=[\d.]+)(,[\d.]+)+", r"\1", path.read_text()))
    for block in (block for page in pages for block in blocks(page) if block.path is not None):
        path = project / block.path
        assert not path.exists(), f"{block.path} is there already: choose another example"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
    asked = list(dict.fromkeys(command for page in pages for command in commands(page)))
    run = sorted((command for command in asked if elsewhere(command) is None), key=stage)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "MPLBACKEND": "agg"}
    file = folder / "outcomes.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "tests.docs.walk", str(file)],
        cwd=project, env=environment, input=json.dumps([*run, *more]), timeout=TIMEOUT_S,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = [Outcome(**json.loads(line)) for line in file.read_text().splitlines()]
    assert [one.command for one in outcomes] == [*run, *more]
    covered = [command for command in asked if elsewhere(command) is not None]
    return Walk(project, outcomes[: len(run)], outcomes[len(run) :], covered)


def stage(command: str) -> int:
    """Order commands by what they read: 0 makes profiles and predictors, 1 makes results, 2 shows them."""
    if re.search(r"experiment=(profile|train_dejavu|pretrain_tiny)", command):
        return 0
    return 2 if re.search(r"-m (analysis|experiments)\.|make report", command) else 1


class UnknownCommand(Exception):
    """A command that is neither run nor in the table of tests/docs/coverage.py."""


codes: dict[tuple[str, ...], int] = {}  # exit codes of what was run, by its settings or arguments


def run_command(command: str) -> int:
    """Run one command of a page; return its exit code."""
    words = split(command)
    if {"|", "||", "&&", ";", ">", "<"} & set(words):
        raise UnknownCommand(f"{command}: several commands in one line")
    program = words[0].rpartition("/")[2]
    if program == "echo":  # of a recipe of the Makefile
        print(*words[1:])
        return 0
    if program == "make":
        return max(map(run_command, recipe(words[1:])))
    if program == "export":
        return subprocess.run(["sh", "-c", command], check=False).returncode
    if program in ("accelerate", "torchrun"):
        words = ["python", *script_of(words)]
    elif program not in ("python", "python3"):
        raise UnknownCommand(f"{command}: tests/docs/walk.py does not know how to run it; see tests/docs/coverage.py")
    if words[1] == "run.py":
        return run_experiment(words[2:])
    if words[1:3] == ["-m", "analysis.figures"]:  # one by one, since several commands draw the same ones
        names = list(itertools.takewhile(lambda word: not word.startswith("-"), words[3:]))
        if len(names) > 1:
            return max(run_command(shlex.join([*words[:3], name, *words[3 + len(names) :]])) for name in names)
    same = tuple(words[1:])
    if same not in codes:  # as `make report` and the command of its recipe
        with few_figures() if "analysis.report" in same else nullcontext():
            codes[same] = run_python(words[1:])
    return codes[same]


@contextmanager
def few_figures() -> Iterator[None]:
    """Let the report draw two figures. Other commands draw them all, and fail where one cannot be drawn."""
    from analysis import figures

    with mock.patch.object(figures, "names", return_value=["fig1", "fig11"]):
        yield


def recipe(arguments: list[str]) -> list[str]:
    """Return the commands of a target of the Makefile, as they are once .venv is there."""
    command = ["make", "--no-print-directory", "-n", "-o", ".venv/.installed", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout:
        raise UnknownCommand(f"make {' '.join(arguments)}: {done.stderr}")
    return done.stdout.splitlines()


def script_of(words: list[str]) -> list[str]:
    """Return the script and its arguments that a launcher starts in several processes; here it is run in one."""
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(words[1:])
    else:
        from accelerate.commands.launch import launch_command_parser

        assert words[1] == "launch", words
        options = launch_command_parser().parse_args(words[2:])
    return [options.training_script, *options.training_script_args]


def run_python(arguments: list[str]) -> int:
    """Run a module (``-m NAME``), code (``-c``) or a script, as ``python`` would; return the exit code."""
    is_module = arguments[0] == "-m"
    name, *rest = arguments[is_module:]
    sys.argv[:] = [name, *rest]
    try:
        if is_module:
            sys.modules.pop(name, None)  # else runpy warns of an import by another command
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        elif name == "-c":
            exec(compile(rest[0], "<page>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def run_experiment(words: list[str]) -> int:
    """Run ``run.py`` in this process at a small size; return its exit code."""
    from experiments.cli import main

    if words and all(word.startswith("--") for word in words):
        return main(words)
    words = [fill(word, words) for word in words]
    launcher = [word for word in words if word.startswith("hydra")]
    if launcher:
        check_launcher(launcher)
    own = [word for word in words if word not in launcher]
    flags, overrides = [word for word in own if "=" not in word], small([word for word in own if "=" in word])
    same = (
        *flags,
        *sorted(dict(override.partition("=")[::2] for override in overrides).items()),
    )  # the last one counts
    if same not in codes:  # else an earlier command is the same at this size
        codes[same] = main([*flags, *overrides])
        if "experiment.install=true" in overrides:
            shutil.copytree(REPOSITORY / MICROWORLD, MICROWORLD, dirs_exist_ok=True)
    return codes[same]


def check_launcher(overrides: list[str]) -> None:
    """Check the settings of a launcher whose jobs are run one after the other here; they have tests of their own."""
    from experiments.config.aliases import replace_aliases
    from experiments.config.compose import compose_config
    from experiments.config.validate import check_overrides, to_dataclass
    from experiments.sweeps import local, slurm

    overrides = replace_aliases(overrides)
    check_overrides(overrides, multirun=True)
    hydra = compose_config(overrides, with_hydra=True).hydra
    module = {"local": local, "slurm": slurm}[hydra.runtime.choices["hydra/launcher"]]
    to_dataclass(module.Settings, hydra.launcher, "hydra.launcher")


def small(overrides: list[str]) -> list[str]:
    """Return the overrides of a command between those that make it small and run it here."""
    from tests.docs import machine

    given = dict(override.partition("=")[::2] for override in overrides)
    experiment, model = given.get("experiment", "accuracy"), model_of(overrides)
    size = ["device=cpu", *SIZES[experiment]]
    if model != "tiny" or given.get("model.random_init") == "true":
        size += ["model.dtype=float32", *machine.narrow(model)]
    if model != "tiny" and given.get("model.random_init") != "true":
        size.append(f"model.path={machine.model(model)}")
    if experiment == "accuracy" and given.get("task") not in MADE:
        size.append(f"task.data_dir={machine.tasks()}")
    if given.get("corpus") in ("c4", "wikitext2"):
        size.append(f"corpus.path={machine.corpus()}")
    # One task of a table's many methods; other commands score all tasks with some methods.
    forced = [f"task={'micro_piqa' if model == 'tiny' else 'piqa'}"] if "paper" in given else []
    if given.get("task") in MADE:
        forced += ["task.lengths=[256]", "task.depths=[0.5]", "task.items_per_cell=2"]
    if given.get("task") == "lm_eval":
        forced.append("task.overrides={generation_kwargs:{max_gen_toks:4}}")
    return [*size, *overrides, *FORCED.get(experiment, []), *forced]


def model_of(overrides: list[str]) -> str:
    """Return the name of the model that a command line is about."""
    given = dict(override.partition("=")[::2] for override in overrides)
    return given.get("model") or table_of(given).get("model", "tiny")


def table_of(given: dict[str, str]) -> dict[str, str]:
    """Return the content of ``conf/paper/<name>.yaml`` for ``paper=<name>``, else nothing."""
    return yaml.safe_load(Path("conf/paper", f"{given['paper']}.yaml").read_text()) if "paper" in given else {}


def fill(word: str, words: list[str]) -> str:
    """Replace in a word what stands for the reader's own: folders of earlier runs, files of /data, numbers of GPUs."""
    from tests.docs import machine

    key, equals, value = word.partition("=")
    model = model_of([other for other in words if "=" in other])
    if "<run id>" in value:
        by_output = "sensitivity.safetensors" if "method=chai_output" in words else "result.json"
        file = "refit.safetensors" if "method.refit=true" in words else by_output
        value = str(newest(value.replace("<run id>", "*"), file))
    elif value == "PROFILE":
        value = str(newest(f"results/profile/{model}/none/*/*"))
    elif value == "PREDICTOR":
        value = str(newest(f"results/train_dejavu/{model}/dejavu/none/*") / "predictor")
    elif value.startswith("/data/"):
        value = str(machine.reader_file(value))
    elif key == "model.device_map":
        value = re.sub(r":\d+", ":cpu", value)
    elif re.search(r"\b[A-Z]{3,}\b|[<>]|\.\.\.", value):
        raise UnknownCommand(f"{word}: tests/docs/walk.py does not know what it stands for")
    return key + equals + value


def newest(pattern: str, file: str = "result.json") -> Path:
    """Return the run folder of a pattern that was completed last, of those that have a file."""
    found = list(Path().glob(f"{pattern}/{file}"))
    assert found, f"no command of the pages makes {pattern}"
    return max(found, key=lambda path: path.stat().st_mtime).parent


def outcome(command: str) -> Outcome:
    """Run a command with its output caught."""
    caught, began, here = StringIO(), time.process_time(), os.getcwd()
    with redirect_stdout(caught), redirect_stderr(caught):
        try:
            code = run_command(command)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except Exception:
            traceback.print_exc()
            code = 1
    os.chdir(here)
    return Outcome(command, code, caught.getvalue(), round(time.process_time() - began, 3))


def measure_peak_once() -> None:
    """Measure the machine's peak once for all benchmarks, for it takes longer than they do at this size."""
    import functools

    from experiments.benchmarks import harness

    harness.machine_peak = functools.cache(harness.machine_peak)


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    if any("experiment=latency" in command for command in asked):
        measure_peak_once()
    with open(sys.argv[1], "w") as file:
        for command in asked:
            print(json.dumps(asdict(outcome(command))), file=file, flush=True)
