"""Every YAML file composes and fits its schema; every mistake is one line with the valid choices, and exit code 2."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Literal

import pytest
from omegaconf import OmegaConf

from chai.loading import load_config
from chai.methods import load_method, method_names
from chai.offline.head_profile import HeadProfile
from experiments.cli import help_text, main
from experiments.config import compose
from experiments.config.compose import choices, combinations, compose_config, task_members
from experiments.config.remedies import REMEDIES
from experiments.config.schema import CONF, REPOSITORY, ConfigError
from experiments.config.validate import check_overrides, check_values, to_dataclass
from experiments.evaluation import accuracy
from experiments.runs.model import model_source
from experiments.runs.resolve import run_folders
from experiments.sweeps.expand import expand
from experiments.sweeps.plan import plan_jobs

EVERY = [
    (path.parent.name, path.stem)
    for path in sorted(CONF.glob("*/*.yaml"))
    if path.parent.name != "paper"  # sweeps
]


def run(*arguments: str, cwd=REPOSITORY) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "run.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("group", "name"), EVERY)
def test_every_yaml_composes(group, name):
    needed = {"model": ["method.clusters=2"], "corpus": ["experiment=profile"]}
    overrides = [f"{group}={name}", *needed.get(group, []), *(["task.name=lm_eval"] if name == "lm_eval" else [])]
    config = compose_config(overrides)
    check_values(config)
    OmegaConf.resolve(config)
    assert config[group].name == name


@pytest.mark.parametrize("name", choices("method"))
def test_every_method_yaml_is_its_dataclass(name, tmp_path):
    """The YAML lists all hyper-parameters with the defaults that the library has, and nothing else."""
    cls = load_method(name)
    profile = HeadProfile.load(REPOSITORY / "experiments" / "microworld" / "profile")
    profile.arrays["cost_output"] = profile.arrays["distances"]  # for the method that needs it
    profile.save(tmp_path)
    config = compose_config([f"method={name}", "model.clusters=null", f"model.profile={tmp_path}"])
    method = to_dataclass(cls, config.method, "method")
    fields = {field.name: field.default for field in dataclasses.fields(cls) if field.init}
    assert set(fields) == set(config.method) - {"name"}
    given = OmegaConf.to_container(config.method, resolve=False)
    for key, default in fields.items():
        if default is not dataclasses.MISSING and given[key] != "${model.profile}":  # the embedded model has one
            assert getattr(method, key) == default


def test_methods_and_their_yamls_are_the_same():
    assert method_names() == choices("method")


@pytest.mark.parametrize("name", choices("model"))
def test_every_model_yaml_builds_its_architecture(name):
    """`random_init` knows the real shape, and the preset of cluster counts fits it."""
    config = compose_config([f"model={name}", "model.random_init=true", "method=mha"])
    shape = load_config(model_source(config))
    assert shape.model_type == config.model.architecture.model_type
    if config.model.clusters is not None:
        clusters = OmegaConf.to_container(config.model)["clusters"]
        load_method("chai")(clusters=clusters).check(shape)


@pytest.mark.parametrize("name", sorted({*choices("task")} - {"lm_eval"}))  # which takes lm-eval's definitions
def test_every_task_yaml_leads_to_single_tasks(name):
    for single in task_members(compose_config([f"task={name}"])):
        if single.task.key is None:  # else its items are made
            assert single.task.harness
            assert single.task.data_file
        assert not single.task.members


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["method=chia"], "unknown method 'chia' (did you mean 'chai'?); valid: chai, chai_output, chai_qkv"),
        (["-m", "method=mha,chia"], "unknown method 'chia'"),
        (["modle=tiny"], "unknown key 'modle' (did you mean 'model'?); valid: batch_size"),
        (["method.tokns=3"], "unknown key 'method.tokns' (did you mean 'method.tokens'?); valid in method: clusters"),
        (["-m", "method=chai,mha", "method.tokens=3"], "unknown key 'method.tokens'; valid in method: name"),
        (["+method.extra=3"], "unknown key 'method.extra'"),
        (["model.architecture.hidden_sise=3"], "did you mean 'model.architecture.hidden_size'?"),
        (["limit=abc"], "limit is abc; valid: 1 or more, or a fraction of the items between 0 and 1 (0.1), or null"),
        (["-m", "limit=5,abc"], "limit is abc; valid: 1 or more"),
        (["limit=0"], "limit is 0; valid: 1 or more"),
        (["batch_size=-1"], "batch_size is -1; valid: 1 or more"),
        (["model.dtype=int8"], "model.dtype is 'int8'; valid: auto, float32, bfloat16, float16"),
        (["device=tpu"], "device is 'tpu'; valid: auto, cpu, cuda"),
        (["model=opt66b"], "model 'opt66b' defines no default cluster counts; set method.clusters"),
        (["task=piqaa"], "unknown task 'piqaa' (did you mean 'piqa'?)"),
        (["limit"], "cannot read the command line"),
        (["method=mha,chai"], "method=mha,chai is a sweep: add -m"),
        (["-m", "method=glob(*)"], "cannot list the values of method=glob(*)"),
        (["+task=piqa"], "cannot read +task=piqa; expected task=NAME"),
        (
            ["hydra/launcher=slrum"],
            "unknown hydra/launcher 'slrum' (did you mean 'slurm'?); valid: basic, local, slurm",
        ),
        (["hydra/launcher=slurm"], "hydra/launcher=slurm is for sweeps: add -m"),
        (["-m", "hydra/launcher=slurm,local"], "hydra/launcher=slurm,local cannot be a sweep"),
        (["-m", "hydra/sweeper=optuna"], "unknown hydra/sweeper 'optuna'; valid: basic"),
        (
            ["-m", "hydra/launcher=slurm", "hydra.launcher.timeout=5"],
            "unknown key 'hydra.launcher.timeout' (did you mean 'hydra.launcher.timeout_min'?); valid in hydra.",
        ),
        (
            ["-m", "hydra.sweep.dir=x"],
            "hydra.sweep.dir has no effect: a sweep's record is below results_dir, in sweeps/",
        ),
        (["task=micro", "task.metric=acc"], "task.metric cannot be set for a group of tasks"),
        (["task=piqa", "task.data_dir=x", "task.data_file=null"], "has no task.data_file"),
        (["task=lm_eval"], "task=lm_eval needs task.name"),
        (["task=lm_eval", "task.name=gsm8k", "task.split=x"], "task.split has no effect with task=lm_eval"),
        (["task=piqa", "task.include_path=x"], "task.include_path is for tasks of lm-eval"),
        (["limit=1.5"], "limit is 1.5; valid: 1 or more, or a fraction"),
        (["experiment=perplexity", "limit=0.5"], "limit is 0.5; valid: 1 or more, or null"),
        (["batch_size=many"], "batch_size is many; valid: 1 or more, or auto"),
        (["experiment=memory", "batch_size=auto"], "batch_size is auto; valid: 1 or more"),
        (["method.name=chia"], "method.name is what method=... sets; valid: chai, chai_output, chai_qkv"),
    ],
)
def test_mistakes_are_refused_before_anything_starts(arguments, expected):
    with pytest.raises(ConfigError) as error:
        check_overrides([argument for argument in arguments if argument != "-m"], multirun="-m" in arguments)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_configuration_is_composed_once_and_every_caller_has_its_own(monkeypatch):
    composed, hydra_compose = [], compose.compose

    def counting(name, overrides, **options):
        composed.append(overrides)
        return hydra_compose(name, overrides, **options)

    monkeypatch.setattr(compose, "compose", counting)
    overrides = ["seed=4711", "method=random", "task=micro_boolq"]
    check_overrides(overrides)
    first = compose_config(overrides)
    (launched,) = plan_jobs([overrides])
    assert [one for one in composed if "seed=4711" in one] == [["method=random", "task=micro_boolq", "seed=4711"]]
    assert first == launched.config and "hydra" not in first
    first.seed, first.method.clusters = 1, [1]
    assert compose_config(overrides) == launched.config
    assert "hydra" in compose_config(overrides, with_hydra=True)


def test_a_mistake_exits_with_two_and_writes_nothing(tmp_path, monkeypatch, capfd):
    """As processes: a word that is refused before any import, and a setting that the imported method refuses."""
    for arguments in (["method=chia"], ["method.clusters=[1,2]"]):
        result = run(*arguments, cwd=tmp_path)
        assert_one_error(result.returncode, result.stdout, result.stderr)
    monkeypatch.chdir(tmp_path)
    code = main(["experiment=pretrain_tiny", "model=llama7b"])
    assert_one_error(code, *capfd.readouterr())
    assert not list(tmp_path.iterdir())


def assert_one_error(code: int, out: str, err: str) -> None:
    assert code == 2
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("error: ") and not out


@pytest.mark.parametrize(
    "arguments", [["method=mha,chia"], ["method.tokens=0"], ["method=mha,chai", "--cfg", "job"]], ids=" ".join
)
def test_a_mistake_in_a_sweep_does_so_too(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["-m", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and len(told.splitlines()) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_help_names_the_sources_of_models_and_corpora():
    lines = {line.split("=V")[0].strip(): line for line in help_text().splitlines() if "=V" in line}
    assert "gguf" in lines["model.K"] and "perplexity" in lines["corpus.K"]
    assert "python (docs or code)" in help_text() and "joined" in help_text()


def test_help_needs_no_heavy_imports():
    """`--help` names the choices without torch, transformers or lm-eval: that is what keeps it instant."""
    code = (
        "import sys; from experiments.cli import main; assert main(['--help']) == 0; "
        "heavy = {'torch', 'transformers', 'lm_eval', 'datasets', 'sklearn', 'pandas'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    for name in (*choices("method"), *choices("model"), *choices("task"), *choices("experiment")):
        assert name in result.stdout
    assert time.perf_counter() - started < 30


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("x", "method.tokens is 'x'; expected int"),
        (0, "method: tokens is 0; valid: 1 or more"),
        (True, "method.tokens is True; expected int"),
    ],
)
def test_ill_typed_hyper_parameters_are_refused(value, message):
    config = compose_config(["method=chai"])
    config.method.tokens = value
    with pytest.raises(ConfigError, match=message):
        to_dataclass(load_method("chai"), config.method, "method")


def test_choice_hyper_parameters_name_their_choices():
    config = compose_config(["method=chai", "method.membership=spectral"])
    with pytest.raises(ConfigError, match="membership is 'spectral'; valid: kmeans, kmedoids, agglomerative"):
        to_dataclass(load_method("chai"), config.method, "method")


@dataclasses.dataclass
class Typed:
    """Every type that options are annotated with."""

    count: int | str | None = 1
    names: list[Literal["a", "b"]] = dataclasses.field(default_factory=list)
    shares: list[float] = dataclasses.field(default_factory=list)
    counts: list[int] | int | None = None
    rate: float = 0.5
    flag: bool = False
    choice: Literal["x", "y"] | None = None
    inner: list[str] = dataclasses.field(default_factory=list)


@pytest.mark.parametrize(
    "values",
    [
        {"count": 3}, {"count": "three"}, {"count": None}, {"names": ["a", "b"]}, {"shares": [1, 0.5]},
        {"counts": [1, 2]}, {"counts": 4}, {"rate": 1}, {"flag": True}, {"choice": "y"}, {"choice": None},
        {"inner": ["free"]},
    ],
    ids=str,
)  # fmt: skip
def test_values_of_the_right_type_are_taken(values):
    typed = to_dataclass(Typed, OmegaConf.create({"name": "typed", **values}), "section")
    assert all(getattr(typed, key) == value for key, value in values.items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 1.5}, "section.count is 1.5; expected int | str | None"),
        ({"count": True}, "section.count is True; expected int | str | None"),
        ({"names": ["a", "c"]}, "section.names is ['a', 'c']; valid: a, b"),
        ({"shares": ["x"]}, "section.shares is ['x']; expected list[float]"),
        ({"shares": 0.5}, "section.shares is 0.5; expected list[float]"),
        ({"counts": [1, True]}, "section.counts is [1, True]; expected list[int] | int | None"),
        ({"rate": "fast"}, "section.rate is 'fast'; expected float"),
        ({"flag": 1}, "section.flag is 1; expected bool"),
        ({"choice": "z"}, "section.choice is 'z'; valid: x, y, null"),
        ({"inner": [1]}, "section.inner is [1]; expected list[str]"),
        ({"chioce": "x"}, "unknown key section 'chioce' (did you mean 'choice'?); valid: choice, count"),
    ],
    ids=str,
)
def test_values_of_a_wrong_type_are_refused_with_the_types(values, message):
    with pytest.raises(ConfigError) as error:
        to_dataclass(Typed, OmegaConf.create(values), "section")
    assert str(error.value).startswith(message)


def test_choices_are_known_from_the_types_of_a_method():
    config = compose_config(["method=chai", "method.membership=kmean"])
    with pytest.raises(ConfigError) as error:
        to_dataclass(load_method("chai"), config.method, "method")
    assert str(error.value) == "method.membership is 'kmean'; valid: kmeans, kmedoids, agglomerative"


def test_combinations_are_those_of_hydras_sweeper():
    arguments = ["a=1,2", "b=[1,2]", "+c='x y',z", "d=range(0,4,2)", "~e", "++f=null", "a=3,4", "g=choice(u,v)"]
    assert combinations(arguments)[:3] == [
        ["a=3", "b=[1,2]", "+c='x y'", "d=0", "~e=null", "++f=null", "g=u"],
        ["a=3", "b=[1,2]", "+c='x y'", "d=0", "~e=null", "++f=null", "g=v"],
        ["a=3", "b=[1,2]", "+c='x y'", "d=2", "~e=null", "++f=null", "g=u"],
    ]
    assert len(combinations(arguments)) == 16


@pytest.mark.parametrize(
    ("alias", "key"),
    [
        (["experiment=latency", "experiment.batch_size=4"], "experiment.rows=4"),
        (["experiment=memory", "experiment.batch_size=4"], "experiment.rows=4"),
        (["experiment=latency", "experiment.repeats=3"], "experiment.rounds=3"),
        (["experiment=memory", "experiment.preallocate=true"], "experiment.reserve=true"),
        (["experiment=pretrain_tiny", "experiment.overwrite_embedded=true"], "experiment.install=true"),
        (["experiment=train_dejavu", "experiment.overwrite_embedded=true"], "experiment.install=true"),
        (["experiment=profile", "profile.saved_samples=2"], "profile.kept=2"),
        (["experiment=profile", "profile.trace_tokens=9"], "profile.history=9"),
        (["experiment=profile", "++profile.aggregate=concatenated"], "++profile.combine=concatenated"),
        (["method=spatten", "method.keep_ratio=0.3"], "method.tokens=0.3"),
    ],
)
def test_an_alias_is_another_spelling_of_its_key(alias, key):
    (replaced,) = expand(alias, multirun=False)
    assert replaced == [alias[0], key]
    check_overrides(replaced)
    assert [f.id for f in run_folders(compose_config(replaced))] == [
        f.id for f in run_folders(compose_config([alias[0], key]))
    ]


def test_aliases_hold_where_all_choices_have_the_key():
    assert expand(["experiment=latency,memory", "experiment.batch_size=2,4"], multirun=True) == [
        ["experiment=latency,memory", "experiment.rows=2,4"]
    ]
    assert expand(["hydra/launcher=local", "hydra.launcher.max_workers=2"], multirun=True) == [
        ["hydra/launcher=local", "hydra.launcher.jobs=2"]
    ]
    # Keys with an alias's name stay what they are, and an alias without its group is an unknown key.
    for same in (
        ["experiment=pretrain_tiny", "experiment.batch_size=2"],
        ["method=chai,spatten", "method.keep_ratio=0.3"],
        ["batch_size=4"],
    ):
        assert expand(same, multirun=True) == [same]
    with pytest.raises(ConfigError, match=r"unknown key 'method.keep_ratio'; valid in method: "):
        check_overrides(expand(["method=chai", "method.keep_ratio=0.3"], multirun=False)[0])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--cfg", "job", "method=mha", "limit=3"], "\nlimit: 3\n"),
        (["method=spatten", "method.keep_ratio=0.3", "--cfg", "job", "--package", "method"], "\ntokens: 0.3\n"),
        (["--cfg", "job", "--resolve", "seed=7"], "\n  seed: 7\n"),
        (["--cfg", "hydra"], "\n  launcher:\n"),
        (["--info", "defaults"], "method/chai"),
        (["--hydra-help"], "hydra/launcher: basic, local, slurm"),
    ],
)
def test_flags_that_only_show_something(arguments, expected, tmp_path):
    shown = run(*arguments, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert expected in shown.stdout
    assert not list(tmp_path.iterdir())


def test_no_relays_between_the_command_line_and_an_experiment(monkeypatch):
    stack = []
    monkeypatch.setattr(accuracy, "run", lambda config: stack.extend(traceback.extract_stack()) or 0)
    assert main(["task=micro_piqa", "limit=1"]) == 0
    own = [frame.name for frame in stack if Path(frame.filename).is_relative_to(REPOSITORY / "experiments")]
    assert own == ["main", "run_config"]


def test_every_remedy_of_the_library_is_worded():
    found = [re.findall(r'remedy="(\w+)"', path.read_text()) for path in (REPOSITORY / "chai").rglob("*.py")]
    assert {name for names in found for name in names} == set(REMEDIES)
    assert "experiment=profile" in REMEDIES["make_profile"] and "experiment.mlp=true" in REMEDIES["train_neurons"]
