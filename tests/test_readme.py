"""Every command of the README works. Those that make an environment are run by .ci/run."""
import importlib
import re
import shlex

import pytest
import torch.distributed.run

from conftest import PROJECT, documents, restoring, run, write_parquet

README = (PROJECT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for block in re.findall(r"```sh\n(.*?)```", README, re.S)
            for line in block.splitlines() if line.strip()]
# what makes a run small enough for a test
SMALL = ("--max_iters=2 --lr_decay_iters=4 --warmup_iters=1 --batch_size=1 --tokens_per_step=64 "
         "--block_size=32 --n_layer=1 --n_head=2 --n_embd=32 --eval_iters=2 --device=cpu "
         "--dtype=float32 --compile=False").split()


def test_the_readme_has_its_two_commands_for_a_fresh_machine():
    environments = [c for c in COMMANDS if c.startswith("python3 -m venv")]
    assert len(environments) == 2
    assert "train.py config/quickstart.py" in environments[0] and environments[1].endswith("pytest")


def test_the_files_of_the_readme_exist():
    table = README.split("## The files")[1].split("\n## ")[0]
    names = re.findall(r"^\| `([^`]+)` \|", table, re.M)
    assert len(names) == 4 and all((PROJECT / name).exists() for name in names)
    recipes = re.findall(r"^\| \**`(\w+\.py)`", README, re.M)
    assert all((PROJECT / f"config/train_fineweb_4070_{name}").exists() for name in recipes[:5])


def small(command):
    """The words of a command, made small enough for a test; None if it needs the network."""
    words = shlex.split(command)
    if words[0] == "pip" or words[:3] == ["python3", "-m", "venv"]:
        return None
    if "train.py" in words and "--dry_run" not in words and "--help" not in words:
        words += SMALL
        if not any("--init_from" in word or "--out_dir" in word for word in words):
            words.append("--overwrite")
        if any("stable.pt" in word for word in words):
            words.append("--max_iters=4")
    if "sample.py" in words:
        words += ["--max_new_tokens=5", "--device=cpu"]
    if "eval.py" in words:
        words += ["--max_documents=5", "--device=cpu"]
    return words


def test_every_other_command_of_the_readme_works(work):
    """In their order, in one folder, as somebody types them who reads from top to bottom."""
    write_parquet("data/fineweb_one_shard/000_00000.parquet", documents(400))
    write_parquet("my.parquet", documents(300, seed=1), column="content")
    (work / "prompt.txt").write_text("Once upon a time", encoding="utf-8")
    (work / "config").symlink_to(PROJECT / "config")
    transformers = pytest.importorskip("transformers")      # its folders come before the hub
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=16, n_positions=64)).save_pretrained("gpt2")
    n_run = 0
    for command in filter(None, map(small, COMMANDS)):
        if command[0] == "torchrun":
            command[command.index("train.py")] = str(PROJECT / "train.py")
            with restoring():
                torch.distributed.run.main(command[1:])
        elif "--interactive" not in command and "--help" not in command:    # see their own tests
            with restoring():
                run(importlib.import_module(command[1].removesuffix(".py")), *command[2:])
        n_run += 1
    assert n_run >= 15


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_of_the_readme_lead_somewhere(path):
    assert (PROJECT / path).exists()
