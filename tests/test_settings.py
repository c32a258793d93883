"""Settings: nanoGPT's names and defaults, typed, checked, explained, written and read again."""
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from conftest import PROJECT, script
from eval import EvalConfig
from onecard.settings import UserError, config_text, configure, read_config_file
from prepare import PrepareConfig
from sample import SampleConfig
from train import TrainConfig

# nanoGPT's train.py, but for backend, device and dtype, which ours detects
NANOGPT = dict(
    out_dir="out", eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False,
    always_save_checkpoint=True, init_from="scratch", wandb_log=False, wandb_project="owt",
    wandb_run_name="gpt2", dataset="openwebtext", gradient_accumulation_steps=40, batch_size=12,
    block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False, learning_rate=6e-4,
    max_iters=600000, weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip=1.0, decay_lr=True,
    warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5, backend="auto", device="auto",
    dtype="auto", compile=True)

MISSION = dict(
    out_dir="out-fineweb-110M-one-shard", eval_interval=500, eval_iters=200, log_interval=50,
    always_save_checkpoint=True, wandb_log=False, dataset="fineweb", batch_size=12,
    gradient_accumulation_steps=40, block_size=1024, n_layer=12, n_head=8, n_embd=512, dropout=0.0,
    learning_rate=6e-4, max_iters=250000, warmup_iters=2000, lr_decay_iters=250000, min_lr=6e-5,
    beta2=0.99, bias=False, compile=True)


@dataclass(frozen=True)
class Settings:
    size: int = 12
    rate: float = 0.5
    name: str = "x"
    fast: bool = False


def test_nanogpts_settings_have_nanogpts_defaults():
    cfg = configure(TrainConfig, [])
    assert {name: getattr(cfg, name) for name in NANOGPT} == NANOGPT


def test_the_missions_config_holds_exactly_its_22_values():
    config = read_config_file(PROJECT / "config" / "train_fineweb_4070_one_shard.py")
    assert config == MISSION and len(config) == 22


def test_every_config_loads_from_any_folder(work):
    for config in (PROJECT / "config").glob("*.py"):
        configure(TrainConfig, [str(config)])


def test_a_config_file_takes_settings_of_a_recipe_from_any_folder(work):
    (work / "c.py").write_text("from config.modern import mlp as _mlp\nencoder = _mlp\n")
    done = script("prepare.py", "c.py", cwd=work, check=False)
    assert done.stderr == "prepare.py: encoder = 'swiglu'; use auto or gigatoken or tiktoken\n"


def test_a_config_file_may_compute_and_import(work):
    (work / "c.py").write_text("import math\nimport numpy as np\nfrom math import sqrt\n_half = 6\n"
                               "size = sqrt(9) * _half\nrate = np.sqrt(4)\n"
                               "name = f'{math.pi:.2f}'\n")
    assert configure(Settings, ["c.py"]) == Settings(size=18, rate=2.0, name="3.14")


def test_the_command_line_wins_over_files_and_later_files_over_earlier(work):
    (work / "a.py").write_text("size = 1\nrate = 1\n")
    (work / "b.py").write_text("rate = 2\n")
    assert configure(Settings, ["--size=7", "a.py", "b.py"]) == Settings(size=7, rate=2.0)


@pytest.mark.parametrize("arguments, changes", [
    (["--name=123", "--rate=1"], dict(name="123", rate=1.0)),
    (["--size=1e4"], dict(size=10000)),
    (["--size", "-5", "--name", "two words"], dict(size=-5, name="two words")),
    (["--fast"], dict(fast=True)),
    (["--fast=false", "--name=a=b"], dict(fast=False, name="a=b"))])
def test_values_take_the_type_of_their_setting(arguments, changes):
    cfg = configure(Settings, arguments)
    assert cfg == Settings(**changes)
    assert [type(getattr(cfg, f.name)) for f in fields(cfg)] == [f.type for f in fields(cfg)]


@pytest.mark.parametrize("arguments, sentence", [
    (["--sise=3"], "--sise=3: no setting is called sise; did you mean size?"),
    (["-size=3"], "-size=3: no setting is called -size; did you mean size?"),
    (["--size=big"], "--size=big: size is a number (int)"),
    (["--size=1.5"], "--size=1.5: size is of type int, not float"),
    (["--size"], "--size needs a value, as in --size=12"),
    (["--fast=maybe"], "--fast=maybe: fast is True or False"),
    (["config/none.py"], "config/none.py: there is no such config file"),
    (["a.parquet"], "a.parquet: not a config file (config/NAME.py) and not --key=value")])
def test_a_mistake_on_the_command_line_is_named(arguments, sentence):
    with pytest.raises(UserError) as error:
        configure(Settings, arguments)
    assert str(error.value) == sentence


@pytest.mark.parametrize("text, sentence", [
    ("sise = 3", "c.py: sise = 3: no setting is called sise; did you mean size?"),
    ("size = True", "c.py: size = True: size is of type int, not bool"),
    ("fast = 1", "c.py: fast = 1: fast is of type bool, not int"),
    ("size = ", "c.py does not run: SyntaxError"),
    ("size = 1 / 0", "c.py does not run: ZeroDivisionError")])
def test_a_mistake_in_a_config_file_is_named(work, text, sentence):
    (work / "c.py").write_text(text)
    with pytest.raises(UserError) as error:
        configure(Settings, ["c.py"])
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize("cls", [TrainConfig, PrepareConfig, SampleConfig, EvalConfig])
def test_every_number_of_every_script_has_a_range(cls):
    for name in [f.name for f in fields(cls) if f.type in (int, float)]:
        for text in ("nan", "inf", "-inf", "-1", "-1e-9", "1e30"):
            with pytest.raises(UserError, match=name):
                configure(cls, [f"--{name}={text}"])


def test_a_written_config_gives_the_same_settings_again(work):
    cfg = configure(TrainConfig, ["--batch_size=3", "--out_dir=it's \"mine\"", "--min_lr=1e-5"])
    Path("again.py").write_text(config_text(cfg))
    assert configure(TrainConfig, ["again.py"]) == cfg


@pytest.mark.parametrize("cls", [TrainConfig, PrepareConfig, SampleConfig])
def test_help_lists_every_setting_with_its_reason(capsys, cls):
    with pytest.raises(SystemExit):
        configure(cls, ["--help"], "What it is for.")
    page = capsys.readouterr().out.splitlines()
    lines = {line.split()[0]: line for line in page if line.startswith("  --")}
    assert "What it is for." in page
    for f in fields(cls):
        default = f" ({f.type.__name__}, {f.default!r})"
        assert f.name == "files" or lines[f"--{f.name}"].removesuffix(default).split()[1:], f.name


def test_a_users_mistake_is_one_sentence_and_a_bug_keeps_its_traceback(work):
    (work / "bug.py").write_text(
        f"import sys\nsys.path.insert(0, {str(PROJECT)!r})\n"
        "from dataclasses import make_dataclass\n"
        "from onecard.settings import configure_and_run\n"
        "configure_and_run(lambda cfg: int('no number'), make_dataclass('Empty', []), '')\n")
    mistake = script(work / "bug.py", "--y=1", check=False)
    assert mistake.returncode == 1 and not mistake.stdout
    assert mistake.stderr == "bug.py: --y=1: no setting is called y; --help lists them\n"
    bug = script(work / "bug.py", check=False)
    assert bug.returncode == 1 and "Traceback" in bug.stderr and "no number" in bug.stderr
