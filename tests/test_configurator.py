import os
import sys
from dataclasses import dataclass, fields

import pytest

from configurator import configure, read_config_file, write_config_file
from conftest import PROJECT, script
from prepare import PrepareConfig
from sample import SampleConfig
from train import TrainConfig

# nanoGPT's train.py: every setting and its default (device, dtype and backend: found out by ours)
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


def write(folder, text, name="c.py"):
    (folder / name).write_text(text, encoding="utf-8")
    return name


def test_nanogpts_settings_have_nanogpts_defaults():
    cfg = configure(TrainConfig, [])
    assert {k: getattr(cfg, k) for k in NANOGPT} == NANOGPT


def test_the_missions_config_holds_exactly_its_values():
    path = str(PROJECT / "config" / "train_fineweb_4070_one_shard.py")
    assert read_config_file(path) == MISSION
    configure(TrainConfig, [path])


@pytest.mark.parametrize("config", sorted((PROJECT / "config").glob("*.py")), ids=lambda p: p.name)
def test_every_config_that_we_ship_loads(config):
    configure(TrainConfig, [str(config)])


def test_a_config_file_may_compute_and_import(work):
    name = write(work, "import time\nfrom math import sqrt\n_hours = 2\nbatch_size = 5 * 8\n"
                       "max_iters = 1e3\nlr_decay_iters = max_iters\nwarmup_iters = 10\n"
                       "wandb_run_name = 'ft-' + str(time.time())\nlearning_rate = sqrt(1e-4)\n")
    cfg = configure(TrainConfig, [name])
    assert (cfg.batch_size, cfg.max_iters, cfg.lr_decay_iters) == (40, 1000, 1000)
    assert cfg.wandb_run_name.startswith("ft-") and cfg.learning_rate == pytest.approx(0.01)
    assert type(cfg.max_iters) is int


def test_the_command_line_wins_over_files_and_later_files_over_earlier(work):
    a, b = write(work, "batch_size = 1\nn_layer = 2\n", "a.py"), write(work, "n_layer = 3", "b.py")
    cfg = configure(TrainConfig, ["--batch_size=7", a, b])
    assert (cfg.batch_size, cfg.n_layer) == (7, 3)


def test_values_take_the_type_of_their_setting():
    cfg = configure(TrainConfig, ["--dataset=123", "--learning_rate=1", "--max_iters=1e4",
                                  "--compile=false", "--eval_only", "--seed", "5"])
    assert cfg.dataset == "123" and cfg.learning_rate == 1.0 and cfg.max_iters == 10000
    assert cfg.compile is False and cfg.eval_only is True and cfg.seed == 5


def test_the_result_cannot_be_changed():
    with pytest.raises(AttributeError):
        configure(TrainConfig, []).batch_size = 3


@pytest.mark.parametrize("argument, words", [
    ("--batch_sise=3", "no setting is called batch_sise; did you mean batch_size?"),
    ("--batch-size=3", "no setting is called batch-size; did you mean batch_size?"),
    ("--divice=RTX 4070",
     "--divice=RTX 4070: no setting is called divice; did you mean device?"),
    ("--batch_size=big", "--batch_size=big: batch_size is a number (int)"),
    ("--batch_size=1.5", "batch_size is of type int, not float"),
    ("--compile=maybe", "compile is True or False"),
    ("--block_size=0", "block_size = 0 must be at least 1"),
    ("--n_head=7",
     "n_embd = 768 does not divide into n_head = 7 heads. Nearest that works: n_embd = 763"),
    ("--dropout=1.5", "dropout = 1.5 is a probability"),
    ("--warmup_iters=600000", "lr_decay_iters = 600000 must come after warmup_iters = 600000"),
    ("config/nothing.py", "config/nothing.py: there is no such config file"),
    ("some.parquet", "some.parquet: not a config file"),
])
def test_a_mistake_on_the_command_line_is_named(argument, words):
    with pytest.raises(ValueError) as error:
        configure(TrainConfig, [argument])
    assert words in str(error.value)


@pytest.mark.parametrize("text, words", [
    ("batch_sise = 3",
     "c.py: batch_sise = 3: no setting is called batch_sise; did you mean batch_size?"),
    ("batch_size = '3'", "c.py: batch_size = '3': batch_size is of type int, not str"),
    ("compile = 1", "compile is of type bool, not int"),
    ("batch_size = True", "batch_size is of type int, not bool"),
    ("batch_size = ", "c.py does not run: SyntaxError"),
    ("batch_size = 1 / 0", "c.py does not run: ZeroDivisionError"),
])
def test_a_mistake_in_a_config_file_is_named(work, text, words):
    with pytest.raises(ValueError) as error:
        configure(TrainConfig, [write(work, text)])
    assert words in str(error.value)


def test_positional_arguments_that_are_no_config_are_files():
    cfg = configure(PrepareConfig, ["a.parquet", "b.parquet", "--force"])
    assert cfg.files == ("a.parquet", "b.parquet") and cfg.force


def test_a_written_config_gives_the_same_settings_again(work):
    cfg = configure(TrainConfig, ["--batch_size=3", "--out_dir=it's \"here\"",
                                  "--learning_rate=1e-5"])
    write_config_file("again.py", cfg)
    assert configure(TrainConfig, ["again.py"]) == cfg


@pytest.mark.parametrize("name, cls", [("train.py", TrainConfig), ("prepare.py", PrepareConfig),
                                       ("sample.py", SampleConfig)])
def test_help_lists_every_setting_with_its_reason(work, name, cls):
    told = " ".join(script(name, "--help", cwd=work, env={"COLUMNS": "200"}).stdout.split())
    source = ((PROJECT / name).read_text(encoding="utf-8")
              + (PROJECT / "model.py").read_text(encoding="utf-8"))
    for f in fields(cls):
        if f.name == "files":
            continue
        line = next(x for x in source.splitlines() if x.startswith(f"    {f.name}: "))
        assert f"--{f.name}" in told and " ".join(line.split("  # ")[1].split()) in told, f.name


def test_a_users_mistake_is_one_sentence_and_our_own_bug_a_traceback(work):
    done = script("train.py", "--batch_sise=3", cwd=work, check=False)
    assert done.returncode == 1
    assert done.stderr == ("train.py: --batch_sise=3: no setting is called batch_sise; "
                           "did you mean batch_size?\n")
    write(work, f"import sys; sys.path.insert(0, {str(PROJECT)!r})\n"
                "from dataclasses import dataclass\nfrom configurator import run\n"
                "@dataclass(frozen=True)\nclass C:\n    x: int = 1\n"
                "def main(cfg):\n    int('not a number')\nrun(main, C, '')\n", "bug.py")
    done = script(str(work / "bug.py"), cwd=work, check=False)
    assert "Traceback" in done.stderr and "not a number" in done.stderr


def test_comments_of_settings_survive_a_percent_sign():
    @dataclass(frozen=True)
    class Odd:
        share: float = 0.5  # 50% of it
    with pytest.raises(SystemExit):
        configure(Odd, ["--help"])
    assert os.path.basename(sys.argv[0])
