"""Every YAML file composes and fits its schema; every mistake is one line with the valid choices, and exit code 2."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time

import pytest
from omegaconf import OmegaConf

from chai.methods import load_method, method_names
from chai.models import load_config
from experiments.cli import main
from experiments.config.schema import (
    CONF,
    REPOSITORY,
    ConfigError,
    check_overrides,
    check_values,
    choices,
    compose_config,
    to_dataclass,
)
from experiments.runs.model import model_source
from experiments.runs.tasks import members

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
    overrides = [f"{group}={name}", *needed.get(group, [])]
    config = compose_config(overrides)
    check_values(config)
    OmegaConf.resolve(config)
    assert config[group].name == name


@pytest.mark.parametrize("name", choices("method"))
def test_every_method_yaml_is_its_dataclass(name):
    """The YAML lists all hyper-parameters with the defaults that the library has, and nothing else."""
    cls = load_method(name)
    config = compose_config([f"method={name}", "model.clusters=null"])
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


@pytest.mark.parametrize("name", choices("task"))
def test_every_task_yaml_leads_to_single_tasks(name):
    for single in members(compose_config([f"task={name}"])):
        assert single.task.harness
        assert single.task.data_file
        assert not single.task.members


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["method=chia"], "unknown method 'chia' (did you mean 'chai'?); valid: chai, chai_qkv"),
        (["-m", "method=mha,chia"], "unknown method 'chia'"),
        (["modle=tiny"], "unknown key 'modle' (did you mean 'model'?); valid: batch_size"),
        (["method.tokns=3"], "unknown key 'method.tokns' (did you mean 'method.tokens'?); valid in method: clusters"),
        (["-m", "method=chai,mha", "method.tokens=3"], "unknown key 'method.tokens'; valid in method: name"),
        (["+method.extra=3"], "unknown key 'method.extra'"),
        (["model.architecture.hidden_sise=3"], "did you mean 'model.architecture.hidden_size'?"),
        (["limit=abc"], "limit: Value 'abc' of type 'str' could not be converted to Integer"),
        (["-m", "limit=5,abc"], "limit: Value 'abc'"),
        (["limit=0"], "limit is 0; valid: 1 or more"),
        (["batch_size=-1"], "batch_size is -1; valid: 1 or more"),
        (["model.dtype=int8"], "model.dtype is 'int8'; valid: auto, float32, bfloat16, float16"),
        (["device=tpu"], "device is 'tpu'; valid: auto, cpu, cuda"),
        (["model=opt66b"], "model 'opt66b' has no cluster counts of its own: give method.clusters"),
        (["task=piqaa"], "unknown task 'piqaa' (did you mean 'piqa'?)"),
        (["limit"], "can't read the command line"),
        (["method=mha,chai"], "method=mha,chai is a sweep: add -m"),
        (["-m", "method=glob(*)"], "can't list the values of method=glob(*)"),
        (["+task=piqa"], "can't read +task=piqa; expected task=NAME"),
        (
            ["hydra/launcher=slrum"],
            "unknown hydra/launcher 'slrum' (did you mean 'slurm'?); valid: basic, local, slurm",
        ),
        (["hydra/launcher=slurm"], "hydra/launcher=slurm is for sweeps: add -m"),
        (["-m", "hydra/launcher=slurm,local"], "hydra/launcher=slurm,local can't be a sweep"),
        (["-m", "hydra/sweeper=optuna"], "unknown hydra/sweeper 'optuna'; valid: basic"),
        (
            ["-m", "hydra/launcher=slurm", "hydra.launcher.timeout=5"],
            "unknown key 'hydra.launcher.timeout' (did you mean 'hydra.launcher.timeout_min'?); valid in hydra.",
        ),
        (
            ["-m", "hydra.sweep.dir=x"],
            "hydra.sweep.dir has no effect: a sweep's record is below results_dir, in sweeps/",
        ),
        (["task=micro", "task.metric=acc"], "task.metric can't be set for a group of tasks"),
        (["task=piqa", "task.data_dir=x", "task.num_fewshot=2"], "has only the items that are scored"),
        (["task=piqa", "task.data_dir=x", "task.data_file=null"], "has no task.data_file"),
        (["method.name=chia"], "method.name is what method=... sets; valid: chai, chai_qkv"),
    ],
)
def test_mistakes_are_refused_before_anything_starts(arguments, expected):
    with pytest.raises(ConfigError) as error:
        check_overrides([argument for argument in arguments if argument != "-m"], multirun="-m" in arguments)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mistake_exits_with_two_and_writes_nothing(tmp_path):
    mistakes = (["method=chia"], ["method.clusters=[1,2]"], ["experiment=pretrain_tiny", "model=llama7b"])
    for arguments in mistakes:
        result = run(*arguments, cwd=tmp_path)
        assert result.returncode == 2
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
        assert result.stderr.startswith("error: ") and not result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [["method=mha,chia"], ["method.tokens=0"], ["method=mha,chai", "--cfg", "job"]], ids=" ".join
)
def test_a_mistake_in_a_sweep_does_so_too(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["-m", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and len(told.splitlines()) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


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
    with pytest.raises(ConfigError, match="membership is 'spectral'; valid: kmeans, agglomerative"):
        to_dataclass(load_method("chai"), config.method, "method")
