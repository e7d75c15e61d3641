"""The shipped files load, every kind of mistake gets one helpful line, flags win, --help is complete."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from titan_fp8 import config as module
from titan_fp8.config import JobConfig, load_config, validate
from titan_fp8.errors import UserError

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "train_configs").glob("*.toml"))
DEBUG = f"--job.config_file={ROOT / 'train_configs' / 'debug.toml'}"


def error_of(*args: str) -> str:
    """The line that `load_config` refuses these arguments with."""
    with pytest.raises(UserError) as caught:
        load_config(list(args))
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.fixture(scope="module")
def schema():
    return dict(module._schema(module._merged_class()))


# ---- the shipped files ----


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_shipped_file_loads_and_runs_short(path):
    from titan_fp8.model.args import FLAVORS

    config = load_config([f"--job.config_file={path}", "--training.steps=20"])
    assert config.training.steps == 20
    assert config.job.config_file == str(path)
    assert config.training.seq_len <= FLAVORS[config.model.flavor].max_seq_len
    assert config.data.source == "builtin", "a shipped file must run without preparing data"
    assert not config.checkpoint.last_save_model_only, "a run must be resumable from its last save"
    assert config.debug.seed == 42


@pytest.mark.parametrize(
    ("name", "tokens", "warmup_tokens", "lr", "final_lr"),
    [
        ("fog_390m", 50e9, 2.5e9, 1e-3, 1e-8),
        ("llama_390m", 50e9, 2.5e9, 1e-3, 1e-8),
        ("fog_1.5b", 125e9, 2.5e9, 2.5e-4, 1e-8),
        ("llama_1.5b", 125e9, 2.5e9, 2.5e-4, 1e-8),
        ("fog_8b", 20e9, 2.5e9, 3e-4, 1e-8),
        ("llama3_8b", 20e9, 2.5e9, 3e-4, 1e-8),
        ("llama2_7b_fp8", 2e12, 2000 * 1024 * 4096, 3e-4, 3e-5),
    ],
)
def test_shipped_budget(name, tokens, warmup_tokens, lr, final_lr):
    """Steps = token budget / tokens of a step, rounded; rel=1e-3 because min_lr_factor has four digits."""
    config = load_config([f"--job.config_file={ROOT}/train_configs/{name}.toml"])
    per_step = config.training.global_batch_size * config.training.seq_len
    assert config.training.steps == round(tokens / per_step)
    assert config.lr_scheduler.warmup_steps == round(warmup_tokens / per_step)
    assert config.optimizer.lr == lr
    assert lr * config.lr_scheduler.min_lr_factor == pytest.approx(final_lr, rel=1e-3)


# ---- what load_config builds ----


def test_defaults_are_filled_in():
    from torchtitan.config import JobConfig as TorchtitanConfig

    config = load_config([])
    assert isinstance(config, TorchtitanConfig)
    assert (config.model.name, config.model.flavor) == ("titan_fp8", "debug")
    assert config.job.custom_config_module == "titan_fp8.config"
    assert config.experimental.custom_import == "titan_fp8.spec"
    assert config.model.converters == ["titan_fp8.float8"]
    assert config.fp8 == JobConfig().fp8
    assert config.to_dict()["fp8"]["loss_scale"]["init"] == 65536.0


def test_reads_what_torchtitan_itself_would_read():
    """On valid input our reader and torchtitan's (which goes through tyro) agree on every key."""
    from torchtitan.config import ConfigManager

    flags = [
        *(
            DEBUG,
            "--training.steps",
            "20",
            "--compile.enable",
            "--fp8.no-power-of-two-scales",
            "--debug.seed=None",
        ),
        *("--architecture.qk_norm=none", "--architecture.final-norm=True", "--fp8.filter=a,!b"),
        *("--training.max-norm=2", "--fp8.loss_scale.enable", "--job.save_config_file", "x.json"),
    ]
    ours = load_config(flags)
    injected = ["--job.custom_config_module=titan_fp8.config", "--experimental.custom_import=titan_fp8.spec"]
    theirs = ConfigManager().parse_args([*flags, *injected, "--model.converters=titan_fp8.float8"])
    assert ours.to_dict() == theirs.to_dict()


def test_users_import_and_converters_stay(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('[experimental]\ncustom_import = "mine"\n[model]\nconverters = ["mine"]\n')
    config = load_config(["--job.config-file", str(path)])
    assert config.experimental.custom_import == "mine"
    assert config.model.converters == ["mine", "titan_fp8.float8"]
    again = load_config(["--experimental.custom_import=mine", "--model.converters=titan_fp8.float8,mine"])
    assert again.model.converters == ["titan_fp8.float8", "mine"]


def test_two_loads_share_nothing():
    load_config([]).fp8.filter.append("x")
    assert load_config([]).fp8.filter == ["layers.*"]


def test_file_values_and_nested_sections(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(
        "[optimizer]\nlr = 1\n[training.dataloader]\nnum_workers = 2\n"
        "[fp8.loss_scale]\nenable = true\nmax = 131072\n"
        '[parallelism]\nmodule_fqns_per_model_part = [["a"], ["b"]]\n'
    )
    config = load_config([f"--job.config_file={path}"])
    assert type(config.optimizer.lr) is float
    assert config.optimizer.lr == 1.0
    assert config.training.dataloader.num_workers == 2
    assert config.fp8.loss_scale.enable
    assert config.fp8.loss_scale.max == 131072.0
    assert config.parallelism.module_fqns_per_model_part == [["a"], ["b"]]


def test_flags_win_over_the_file():
    before = load_config([DEBUG])
    assert (before.training.steps, before.fp8.amax_history) == (200, 16)
    config = load_config([DEBUG, "--training.steps", "7", "--fp8.amax-history=3", "--fp8.filter=a,!b"])
    assert (config.training.steps, config.fp8.amax_history) == (7, 3)
    assert config.fp8.filter == ["a", "!b"]
    assert config.training.seq_len == before.training.seq_len


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        ("--compile.enable", True),
        ("--compile.enable=true", True),
        ("--compile.enable True", True),
        ("--compile.enable --training.steps=3", True),
        ("--compile.no-enable", False),
        ("--compile.no_enable", False),
        ("--compile.enable=false", False),
        ("--compile.enable false", False),
        ("--compile.enable --compile.no-enable", False),
    ],
)
def test_bool_flags(flags, value):
    assert load_config(flags.split()).compile.enable is value


@pytest.mark.parametrize(
    ("flag", "section", "key", "value"),
    [
        ("--architecture.qk-norm=none", "architecture", "qk_norm", "none"),
        ("--architecture.qk-norm=None", "architecture", "qk_norm", None),
        ("--architecture.no-final-norm", "architecture", "final_norm", False),
        ("--lr_scheduler.decay_ratio=.2", "lr_scheduler", "decay_ratio", 0.2),
        ("--training.max_norm=inf", "training", "max_norm", float("inf")),
        ("--training.global-batch-size -1", "training", "global_batch_size", -1),
        ("--checkpoint.exclude_from_loading=", "checkpoint", "exclude_from_loading", []),
        ("--job.description=a=b", "job", "description", "a=b"),
    ],
)
def test_flag_values(flag, section, key, value):
    assert getattr(getattr(load_config(flag.split()), section), key) == value


# ---- mistakes in a file ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[training]\nsteps = "1000"', '[training] steps must be an integer, got "1000": remove the quotes'),
        ('[training]\nsteps = "many"', 'steps must be an integer, got "many": write a whole number'),
        ("[training]\nsteps = true", "[training] steps must be an integer, got true"),
        ("[training]\nsteps = 1.5", "[training] steps must be an integer, got 1.5"),
        ("[training]\nsteps = 9999999999999999999", "[training] steps must be below 2^63"),
        ("[training]\nstps = 3", '[training] stps is not a key, got 3: did you mean "steps"?'),
        ("[training]\nlog_freq = 3", "log_freq is not a key, got 3: log_freq belongs to [metrics]"),
        ("[training]\namax_histry = 3", 'got 3: did you mean "amax_history" of [fp8]?'),
        ("[training]\nzzzz = 3", "[training] zzzz is not a key, got 3: --help lists the keys"),
        ("[training.dataloader]\nnum_worker = 3", '[training.dataloader] num_worker is not a key, got 3'),
        ("[trainig]\nsteps = 3", "got [trainig]: did you mean [training]?"),
        ("[loss_scale]\nenable = true", "got [loss_scale]: did you mean [fp8.loss_scale]?"),
        ("[zzzz]\nx = 1", "got [zzzz]: --help lists the sections"),
        ("log_freq = 3", "log_freq is not a key outside the sections, got 3: log_freq belongs to [metrics]"),
        ("training = 3", "training must be a section, got 3: write [training]"),
        ("[fp8]\nloss_scale = true", "[fp8] loss_scale must be a section, got true: write [fp8.loss_scale]"),
        ("[[training]]\nsteps = 3", "training must be a section"),
        ("[training.steps]\nx = 3", '[training] steps must be an integer, got {"x": 3}'),
        ('[fp8]\nrecipe = "delay"', '"tensorwise", "rowwise", "delayed", got "delay": did you mean "delayed"?'),
        ("[fp8]\nrecipe = 3", '[fp8] recipe must be one of "bf16", "tensorwise", "rowwise", "delayed", got 3'),
        ('[model]\nconverters = "a,b"', '[model] converters must be a list, got "a,b": write ["a", "b"]'),
        ("[model]\nconverters = [1]", "converters must be a list whose every element is a string, got [1]"),
        ('[compile]\nenable = "true"', 'enable must be true or false, got "true": remove the quotes'),
        ("[compile]\nenable = 1", "[compile] enable must be true or false, got 1: write true or false"),
        ("[job]\ndescription = 1", "[job] description must be a string, got 1: put it in quotes"),
        ('[optimizer]\nlr = "1e-3"', '[optimizer] lr must be a number, got "1e-3": remove the quotes'),
        ("[optimizer]\nlr = nan", "[optimizer] lr must be a number, got NaN"),
        ("[optimizer]\nlr = inf", "[optimizer] lr must be above 0 and finite, got Infinity"),
        ("[optimizer]\nlr = 0", "[optimizer] lr must be above 0, got 0.0: the default is 0.0008"),
        ('[debug]\nseed = "x"', '[debug] seed must be an integer, got "x"'),
        ("[debug]\nseed = 2020-01-01", '[debug] seed must be an integer, got "2020-01-01"'),
        ("[validation]\nsteps = -3", "[validation] steps must be -1 or at least 1, got -3"),
        ('[job]\ndescription = ["a\\nb"]', '[job] description must be a string, got ["a\\nb"]'),
        ('[parallelism]\ncontext_parallel_load_balancer = ""', "load_balancer cannot be an empty"),
        ('[fp8]\nattention = "full"\nrecipe = "bf16"', '[fp8] attention needs recipe "delayed", not "bf16"'),
        ("[training\nsteps = 1", "the file must be valid TOML, got: "),
        ("[training]\nsteps = 1\nsteps = 2", "got: Cannot overwrite a value"),
    ],
)  # fmt: skip
def test_mistake_in_file(tmp_path, text, expected):
    path = tmp_path / "a.toml"
    path.write_text(text)
    line = error_of(f"--job.config_file={path}")
    assert line.startswith(f"{path}: ")
    assert expected in line


def test_unreadable_files(tmp_path):
    assert "No such file" in error_of("--job.config_file=nowhere.toml")
    assert "Is a directory" in error_of("--job.config_file", str(tmp_path))
    path = tmp_path / "latin.toml"
    path.write_bytes(b'[job]\ndescription = "\xe9"')
    assert "must be UTF-8, got another encoding at byte 21" in error_of(f"--job.config_file={path}")


# ---- mistakes on the command line ----


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--training.steps=abc", '--training.steps must be an integer, got "abc": write a whole number'),
        ("--training.steps 2.5", '--training.steps must be an integer, got "2.5": write a whole number'),
        ("--training.stps=2", "got --training.stps=2: did you mean --training.steps?"),
        ("--steps=2", "did you mean --training.steps or --validation.steps?"),
        ("--training.log-freq=2", "did you mean --metrics.log_freq?"),
        ("--zzzz", "got --zzzz: --help lists the flags"),
        ("debug.toml", 'must be a flag, got "debug.toml": write --section.key=value'),
        ("-x", 'every argument must be a flag, got "-x"'),
        ("--training.steps", "--training.steps must have a value, got none: write --training.steps=VALUE"),
        ("--training.steps --compile.enable", "--training.steps must have a value"),
        ("--fp8.loss-scale=1", '--fp8.loss-scale is a section, got "1": set one of its keys: enable,'),
        ("--compile.enable=maybe", '--compile.enable must be true or false, got "maybe"'),
        ("--compile.no-enable=true", "--compile.no-enable takes no value"),
        ("--training.no-steps", "got --training.no-steps: did you mean --training.steps?"),
        ("--fp8.recipe=delay", '"delayed", got "delay": did you mean "delayed"?'),
        ("--optimizer.lr=-1", "--optimizer.lr must be above 0, got -1.0"),
        ("--debug.seed=none", '--debug.seed must be an integer, got "none"'),
    ],
)  # fmt: skip
def test_mistake_in_flags(flags, expected):
    line = error_of(*flags.split())
    assert line.startswith("command line: ")
    assert expected in line


def test_broken_combination_names_both_sources():
    line = error_of(DEBUG, "--fp8.recipe=bf16")
    assert line.startswith(f"{DEBUG.partition('=')[2]} and command line: [fp8] attention needs recipe")


# ---- combinations ----


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--model.name=llama3", '[model] name must be "titan_fp8", got "llama3"'),
        ("--model.tokenizer-path=x", "[model] tokenizer_path is not read here"),
        ("--model.converters=quantize.linear.float8", "[model] converters must not hold"),
        ("--model.converters=float8", "[model] converters must be ones that [experimental] custom_import"),
        ("--quantize.linear.float8.emulate", "[quantize.linear.float8] emulate has no effect here"),
        ("--job.custom_config_module=mine", "[job] custom_config_module must be"),
        ("--experimental.custom_args_module=mine", "[experimental] custom_args_module is not read"),
        (
            "--stability.loss_spike=act --checkpoint.no-enable",
            '[stability] loss_spike must be "off" or "warn" in a run that writes no checkpoints, got "act"',
        ),
        (
            "--stability.loss_spike=act --checkpoint.enable --checkpoint.interval=5 --metrics.log_freq=20 "
            "--checkpoint.keep_latest_k=4",
            "must let a checkpoint live for 20 steps (metrics.log_freq, a spike is seen so late), or be 0, got 4: write 5",
        ),
        ("--stability.fp8_range=act --fp8.recipe=bf16", '[stability] fp8_range "act" needs [fp8] recipe "delayed"'),
        ("--stability.attention=act --fp8.attention=off", '[stability] attention "act" needs FP8 attention'),
        ("--fp8.attention=forward --fp8.recipe=tensorwise", '[fp8] attention needs recipe "delayed"'),
        (
            "--fp8.attention=forward --fp8.attention_forward=triton",
            '[fp8] attention_forward "triton" needs attention "full", not "forward"',
        ),
        ("--fp8.filter=", "[fp8] filter must name modules"),
        ("--fp8.loss_scale.enable --fp8.recipe=bf16", '[fp8.loss_scale] enable needs FP8, got recipe "bf16"'),
        ("--optimizer.implementation=foreach", '[optimizer] implementation must be "fused"'),
        ("--fp8.loss_scale.min=1e6", "[fp8.loss_scale] init must lie between"),
        ("--fp8.loss_scale.max=1e3", "[fp8.loss_scale] init must lie between"),
        ("--optimizer.early_step_in_backward", "[optimizer] early_step_in_backward must be false"),
        ("--parallelism.pipeline_parallel_degree=2", "[parallelism] pipeline_parallel_degree must be 1"),
        ("--parallelism.context_parallel_degree=2", "[parallelism] context_parallel_degree must be 1"),
        ("--parallelism.expert_parallel_degree=2", "[parallelism] expert_parallel_degree must be 1"),
        ("--parallelism.expert_tensor_parallel_degree=2", "expert_tensor_parallel_degree must be 1"),
        ("--parallelism.tensor_parallel_degree=2 --training.seq_len=33", "got 33: choose a degree that divides it and"),
        (
            "--parallelism.tensor_parallel_degree=2 --training.seq_len=10",
            "[training] seq_len * local_batch_size (8) must be a multiple of 16 * tensor_parallel_degree (32)",
        ),
        (
            "--training.seq_len=100 --training.local_batch_size=3",
            "[training] seq_len * local_batch_size (3) must be a multiple of 16 for FP8 GEMMs, got 100: change one",
        ),
        ("--validation.enable --validation.seq_len=9", "[validation] seq_len * local_batch_size (8) must be"),
        ("--parallelism.tensor_parallel_degree=2 --parallelism.disable_loss_parallel", "always computed in parallel"),
        ("--parallelism.enable_async_tensor_parallel", "enable_async_tensor_parallel must be false"),
        ("--parallelism.data_parallel_replicate_degree=2 --parallelism.data_parallel_shard_degree=1", "DDP"),
        ("--memory_estimation.enable", "[memory_estimation] enable must be false"),
        ("--fault_tolerance.enable", "[fault_tolerance] enable must be false"),
        ("--training.enable_cpu_offload", "[training] enable_cpu_offload must be false: it is not supported"),
        ("--activation_checkpoint.mode=memory_budget", "[activation_checkpoint] mode needs [compile] enable"),
        ("--activation_checkpoint.selective_ac_option=ops", 'selective_ac_option must be'),
        ("--training.global_batch_size=9", "must be a multiple of local_batch_size (8), got 9"),
        ("--data.source=files", '[data] path must be set with source "files"'),
        ("--data.source=shards", '[data] path must be set with source "shards"'),
        ("--data.source=files --data.path=x --job.dump_folder=y/../x/run", "[job] dump_folder must lie outside [data] path"),
        ("--data.path=x", '[data] path is not read with source "builtin"'),
        ("--validation.enable --data.held_out=0", "[data] held_out must be above 0 while"),
        ("--validation.enable --validation.seq_len=4096", "[validation] seq_len must not exceed"),
        ("--checkpoint.keep_latest_k=1", "[checkpoint] keep_latest_k must be 0 (keep all) or at least 2"),
        ("--checkpoint.last_save_in_hf --checkpoint.no-last_save_model_only", "last_save_in_hf needs"),
        ("--checkpoint.no-enable --checkpoint.create_seed_checkpoint", "[checkpoint] create_seed_checkpoint needs"),
        ("--checkpoint.enable --checkpoint.load_only --checkpoint.create_seed_checkpoint", "nothing would be written"),
        ("--profiling.profile_freq=3", "[profiling] profile_freq must be at least"),
    ],
)  # fmt: skip
def test_broken_combination(flags, expected):
    line = error_of(*flags.split())
    assert expected in line
    assert ", got " in line
    assert line.partition(", got ")[2].count(": ") >= 1, "no remedy"


@pytest.mark.parametrize(
    "flags",
    [
        "--fp8.recipe=bf16 --fp8.filter=",
        "--fp8.recipe=bf16 --training.seq_len=9",
        "--training.seq_len=100 --training.local_batch_size=4 --validation.seq_len=9",
        "--fp8.recipe=tensorwise --fp8.loss_scale.enable",
        "--parallelism.data_parallel_replicate_degree=2 --parallelism.data_parallel_shard_degree=2",
        "--activation_checkpoint.mode=memory_budget --compile.enable",
        "--activation_checkpoint.selective_ac_option=op",
        "--data.held_out=0",
        "--data.source=files --data.path=x/text --job.dump_folder=x",
        "--data.source=shards --data.path=x --job.dump_folder=x/run",
        "--validation.enable --data.held_out=0 --data.source=shards --data.path=x",
        "--checkpoint.keep_latest_k=0",
        "--checkpoint.last_save_in_hf",
        "--prometheus.port=0",
        "--lr_scheduler.warmup_steps=300 --training.steps=20",
    ],
)
def test_neighbours_of_broken_combinations_pass(flags):
    load_config(flags.split())


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("training.steps", 1, 0),
        ("optimizer.beta2", 0.0, 1.0),
        ("optimizer.beta1", 0.999, -0.1),
        ("fp8.margin", 8, 9),
        ("fp8.amax_history", 1, 0),
        ("fp8.loss_scale.growth_factor", 1.5, 1.0),
        ("fp8.loss_scale.backoff_factor", 0.5, 1.0),
        ("data.held_out", 0.5, 0.51),
        ("stability.risk", 1.0, 0.0),
        ("stability.sigma", 3.5, 0.0),
        ("stability.max_rollbacks", 0, -1),
        ("stability.answer_steps", 1, 0),
        ("prometheus.port", 65535, 65536),
        ("checkpoint.load_step", -1, -2),
        ("training.global_batch_size", -1, 0),
        ("lr_scheduler.total_steps", None, 0),
    ],
)
def test_range_edges_on_a_built_config(key, good, bad):
    """`validate` itself checks ranges too, for a config changed in code."""
    config = load_config([])
    section, _, name = key.rpartition(".")
    setattr(module._get(config, section), name, good)
    validate(config)
    setattr(module._get(config, section), name, bad)
    with pytest.raises(UserError, match=re.escape(f"[{section}] {name} must be ")):
        validate(config)


def test_every_range_belongs_to_a_number(schema):
    for key in module._RANGE_OF:
        assert str(schema[key]).count("int") or str(schema[key]).count("float"), key


def test_every_default_has_a_type_the_loader_knows(schema):
    defaults = module._merged_class()()
    for key, kind in schema.items():
        if not dataclasses.is_dataclass(kind):
            assert module._coerce(module._get(defaults, key), kind) == module._get(defaults, key), key


# ---- help ----


def own_meanings() -> dict[str, str]:
    """Class.key -> its docstring, from the source of titan_fp8.config."""
    meanings = {}
    for cls in ast.parse(Path(module.__file__).read_text()).body:
        if isinstance(cls, ast.ClassDef) and dataclasses.is_dataclass(getattr(module, cls.name, None)):
            for statement, after in zip(cls.body, [*cls.body[1:], None], strict=True):
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    text = after.value if isinstance(after, ast.Expr) else None
                    meaning = text.value if isinstance(text, ast.Constant) else ""
                    meanings[f"{cls.name}.{statement.target.id}"] = str(meaning)
    return meanings


def test_help_shows_every_key_and_our_meanings(schema, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        load_config(["--job.config_file=nowhere.toml", "--help"])
    assert caught.value.code == 0
    squeezed = re.sub(r"[\s│]", "", capsys.readouterr().out)
    for key, kind in schema.items():
        if not dataclasses.is_dataclass(kind):
            assert f"--{key.replace('_', '-')}" in squeezed, key
    sections = {f.type.__name__ for f in dataclasses.fields(JobConfig)} | {"LossScale", "Fp8Adam"}
    meanings = own_meanings()
    assert "Fp8.recipe" in meanings
    for key, meaning in meanings.items():
        if key.split(".")[0] in sections and key not in ("Fp8.loss_scale", "Optimizer.fp8"):
            assert meaning, f"{key} has no meaning"
            assert "\n" not in meaning
            assert re.sub(r"\s", "", meaning) in squeezed, key


def test_sections_are_cheap_to_import():
    program = (
        "import sys, titan_fp8.config; sys.exit(bool({'torch', 'torchtitan', 'tyro'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
