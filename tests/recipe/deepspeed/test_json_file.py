"""DeepSpeed JSONs: strict reading, overrides, and a table of keys that agrees with the installed DeepSpeed."""

from __future__ import annotations

import enum
import json
import types
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel

from toolkit.errors import UserError
from toolkit.recipe.deepspeed import keys as ds_keys
from toolkit.recipe.deepspeed.json_file import ds_config_names, load_deepspeed
from toolkit.recipe.deepspeed.refusals import REFUSED
from toolkit.recipe.load import load_recipe
from toolkit.recipe.resolve import resolve


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return str(path)


def error_of(name, overrides=None):
    with pytest.raises(UserError) as caught:
        load_deepspeed(name, overrides)
    assert "\n" not in caught.value.message and "\n" not in caught.value.hint
    return caught.value


def test_the_shipped_strategies():
    strategies = {"zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_nvme"}
    assert strategies <= set(ds_config_names())
    readme = (Path(__file__).parents[3] / "ds_configs" / "README.md").read_text(encoding="utf-8")
    for name in ds_config_names():
        config = load_deepspeed(name)
        assert config["zero_optimization"]["stage"] == int(name[4])
        assert config["zero_optimization"]["overlap_comm"] is False
        assert f"| `{name}` |" in readme


def test_overrides_reach_inside_and_numbers_are_numbers():
    config = load_deepspeed("zero3", {"zero_optimization": {"stage3_max_live_parameters": 1e8, "sub_group_size": None}})
    assert config["zero_optimization"]["stage3_max_live_parameters"] == 100_000_000
    assert isinstance(config["zero_optimization"]["stage3_max_live_parameters"], int)
    assert "sub_group_size" not in config["zero_optimization"]
    assert "sub_group_size" in load_deepspeed("zero3")["zero_optimization"]


def test_every_unknown_key_and_wrong_type_is_named_at_once(tmp_path):
    path = write(
        tmp_path / "z.json",
        {
            "gradient_cliping": 1.0,
            "zero_optimization": {"stage": 4, "overlap_com": True, "offload_optimizer": {"devise": "cpu"}},
            "bf16": {"enabled": "auto"},
            "steps_per_print": True,
            "prescale_gradients": 1,
            "comms_logger": [],
            "compression_training": {"weight_quantization": {}, "layer_reduction": {"enabled": True}},
            "optimizer": {"params": {"momentum": 0.9}},
        },
    )
    error = error_of(path, {"zero_optimization": {"reduce_bucket_size": "big"}})
    for named, remedy in (
        ("z.json: gradient_cliping ", " gradient_clipping?"),
        ("z.json: zero_optimization.stage=4 ", "0, 1, 2, 3"),
        ("zero_optimization.overlap_com ", " zero_optimization.overlap_comm?"),
        ("offload_optimizer.devise ", " zero_optimization.offload_optimizer.device?"),
        ('bf16.enabled is "auto"', "ds.KEY=null"),
        ("steps_per_print=True ", "number"),
        ("prescale_gradients=1 ", "true"),
        ("comms_logger=[] ", "comms_logger as {…}"),
        ("compression_training ", "set ds.compression_training=null"),
        ("optimizer.params.momentum ", ""),
        ("ds.zero_optimization.reduce_bucket_size='big' ", "number"),
    ):
        assert named in error.message and remedy in error.hint, named


@pytest.mark.parametrize(
    ("text", "named", "remedy"),
    [
        ('{"bf16": {"enabled": true},\n "zero_optimization": {"stage": 2,}\n}', "line 2, column", "comma"),
        ('{\n  // a comment\n  "bf16": {}\n}', "line 2, column 3", '"_comment"'),
        ("[]", "z.json", "braces"),
        ('{"bf16": {}, "bf16": {}}', "bf16", "one"),
        ('{"steps_per_print": NaN}', "steps_per_print=NaN", "number"),
        ('{"steps_per_print": Infinity}', "steps_per_print=Infinity", "number"),
        ('{"leaf": 1,\n// why\n"bf16": {}}', "line 2, column 1", '"_comment"'),
        ('{"bf16": {"enabled": true,}}', "line 1, column", "comma"),
        ('{"bf16": {"enabled": "True"}}', "bf16.enabled='True'", " true "),
        ('{"zero_optimization": {"stage": "3"}}', "zero_optimization.stage='3'", " 3 "),
        ('{"zero_optimization": {"reduce_bucket_size": "5e8"}}', "='5e8'", " 500000000 "),
        ('{"offload_optimizer": {}}', "offload_optimizer", " zero_optimization.offload_optimizer"),
        ('{"zero_optimization": {"aio": {}}}', "zero_optimization.aio", " aio"),
        ('{"aio": {"nvme_path": "x"}}', "aio.nvme_path", " zero_optimization.offload_param.nvme_path "),
        ('{"aio": {"thread_count": 1}}', "aio.thread_count", " aio.intra_op_parallelism"),
        (
            '{"zero_optimization": {"offload_optimizer": {"buffer_size": 9}, "offload_param": {"buffer_size": 8}}}',
            "offload_optimizer.buffer_size",
            " zero_optimization.offload_param.buffer_size",
        ),
        ("", "line 1, column 1", "zero2.json"),
    ],
)
def test_broken_json_is_named_with_its_place(tmp_path, text, named, remedy):
    error = error_of(write(tmp_path / "z.json", text))
    assert "z.json" in error.message and named in error.message and remedy in error.hint


def test_a_byte_order_mark_and_comments_as_keys_are_ignored(tmp_path):
    path = write(tmp_path / "z.json", {"_comment": "for two cards", "bf16": {"enabled": True, "//": "not fp16"}})
    Path(path).write_bytes(b"\xef\xbb\xbf" + Path(path).read_bytes())
    assert load_deepspeed(path) == {"bf16": {"enabled": True}}


def test_auto_is_explained_once_and_counts_as_absent(tmp_path):
    """What the Hugging Face documentation recommends for ZeRO-3."""
    half = {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16}
    sizes = {"reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}
    config = {"fp16": half, "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 3, **sizes}}
    config |= {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, "train_batch_size": "auto"}
    path = write(tmp_path / "hf.json", config)
    message = error_of(path).message
    assert message.count('"auto"') == 1
    keys = "fp16.enabled, bf16.enabled, zero_optimization.reduce_bucket_size, zero_optimization.stage3_prefetch_bucket_"
    assert f'hf.json: {keys}size are "auto"' in message
    with pytest.raises(UserError) as caught:
        resolve(load_recipe("t5_small", ds=path), 1, has_gpu=False, needs_data=False)
    assert caught.value.message == message  # it is the only problem
    corrected = [f"ds.zero_optimization.{key}=null" for key in sizes] + ["ds.fp16=null", "ds.bf16.enabled=true"]
    assert resolve(load_recipe("t5_small", corrected, ds=path), 1, has_gpu=False, needs_data=False).precision == "bf16"


def test_a_json_that_does_not_exist():
    assert " zero3?" in error_of("zero33").hint
    assert "zero3_offload" in error_of("nothing_like_it").hint
    assert "nowhere/z.json" in error_of("nowhere/z.json").message


def test_auto_is_kept_for_the_resolver_where_the_recipe_owns_the_value(tmp_path):
    config = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto"}},
    }
    assert load_deepspeed(write(tmp_path / "z.json", config)) == config


# --- the table of keys against the installed DeepSpeed ---------------------------------------------------------------


def kind_of(annotation):
    """The table's word for a pydantic annotation; None where the table may say what it likes."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        inner = [part for part in typing.get_args(annotation) if part is not type(None)]
        return kind_of(inner[0]) if len(inner) == 1 else None
    if origin is not None:
        return origin.__name__
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return tuple(member.value for member in annotation if member.name != "max_stage")
    return "str" if annotation is Path else getattr(annotation, "__name__", None)


def assert_agrees(table, model):
    names = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
    assert set(table) == set(names)
    for name, annotation in names.items():
        mine, theirs = table[name], kind_of(annotation)
        if isinstance(mine, dict):
            assert theirs == "section"
        elif not (isinstance(mine, tuple) and theirs == "str") and theirs not in (None, "any"):
            assert mine == theirs or (mine == "any" and theirs is None), name


def test_sections_have_the_keys_and_types_of_the_installed_deepspeed():
    pytest.importorskip("deepspeed")
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zenflow.zenflow_config import ZenFlowConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    known = ds_keys.KNOWN
    for table, model in (
        (ds_keys.ZERO_OPTIMIZATION, DeepSpeedZeroConfig),
        (ds_keys.OFFLOAD_OPTIMIZER, DeepSpeedZeroOffloadOptimizerConfig),
        (ds_keys.OFFLOAD_PARAM, DeepSpeedZeroOffloadParamConfig),
        (ds_keys.ZENFLOW, ZenFlowConfig),
        (ds_keys.ZERO_OPTIMIZATION["leaf_module"], DeepSpeedZeroLeafModuleConfig),
        (ds_keys.BF16, DeepSpeedBF16Config),
        (ds_keys.FP16, DeepSpeedFP16Config),
        (ds_keys.COMPILE, CompileConfig),
        (ds_keys.COMMS_LOGGER, CommsLoggerConfig),
        (known["tensorboard"], TensorBoardConfig),
        (known["wandb"], WandbConfig),
        (known["csv_monitor"], CSVConfig),
        (known["timers"]["throughput"], DeepSpeedThroughputTimerConfig),
    ):
        assert_agrees(table, model)


class Recording(dict):
    """A configuration that notes which of its keys are asked for."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.asked = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self):
        return self

    def __copy__(self):
        return self


def test_every_key_that_the_installed_deepspeed_asks_for_is_known_or_refused():
    """A DeepSpeed that reads one more key fails this, until someone says what it does here."""
    config = pytest.importorskip("deepspeed.runtime.config")
    sections = {name: Recording() for name in ("data_types", "aio", "flops_profiler", "torch_autocast")}
    sections["torch_autocast"]["lower_precision_safe_modules"] = []
    read = Recording(train_batch_size=4, train_micro_batch_size_per_gpu=4, **sections)
    config.DeepSpeedConfig(read)
    # The last one is asked for only where a model-parallel unit is given.
    assert read.asked == (set(ds_keys.KNOWN) | {key for key in REFUSED if "." not in key}) - {"sequence_parallel_size"}
    for name, section in sections.items():
        assert section.asked == set(ds_keys.KNOWN[name]), name
    removed = {f"zero_optimization.{key}" for key in config._REMOVED_ZERO_CONFIG_KEYS}
    assert removed | set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS) <= REFUSED


@pytest.mark.parametrize("name", ds_config_names())
def test_deepspeed_itself_accepts_what_a_strategy_resolves_to(name):
    config = pytest.importorskip("deepspeed.runtime.config")
    # T5's family does not bear fp16, and one rank is no node of eight.
    off = ["ds.fp16.enabled=false", "ds.zero_optimization.zero_hpz_partition_size=null"]
    for recipe in ("demo", "t5_small"):
        run = resolve(load_recipe(recipe, off, ds=name), 1, has_gpu=True, needs_data=False)
        parsed = config.DeepSpeedConfig(json.loads(json.dumps(run.deepspeed)))
        assert parsed.zero_optimization_stage == run.zero_stage == int(name[4])
        assert parsed.bfloat16_config.enabled == (run.precision == "bf16")
        assert parsed.torch_autocast_enabled == (run.autocast is not None)
        assert parsed.zero_config.overlap_comm is False
        assert parsed.gradient_clipping == (run.recipe.training.gradient_clipping if run.zero_stage else 0.0)
        assert parsed.gradient_accumulation_steps == run.accumulation_steps
        assert (parsed.zero_config.offload_optimizer is not None) == name.endswith(("offload", "nvme"))
        assert parsed.scheduler_name is None
