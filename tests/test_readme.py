"""Every command of the README works. Those that make an environment are run by .ci/run."""
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import PROJECT, documents, script, write_parquet

README = (PROJECT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("  #")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.S)
            for line in block.splitlines() if line.strip() and not line.startswith("#")]

# what makes a run small enough for a test, whatever the config says
SMALL = ("--max_iters=2 --lr_decay_iters=4 --warmup_iters=1 --batch_size=1 "
         "--gradient_accumulation_steps=2 --block_size=32 --n_layer=1 --n_head=2 --n_embd=32 "
         "--eval_iters=2 --device=cpu --dtype=float32 --compile=False").split()


def test_the_readme_has_its_two_commands():
    environments = [c for c in COMMANDS if c.startswith("python3 -m venv")]
    assert len(environments) == 2
    assert "train.py config/quickstart.py" in environments[0] and environments[1].endswith("pytest")


def test_every_file_in_the_tree_of_the_readme_exists_and_every_file_is_in_it():
    tree = README.split("## The files")[1].split("\n## ")[0]
    named = set(re.findall(r"^\| `([^`]+)` \|", tree, re.M))
    assert named and all((PROJECT / name).exists() for name in named)
    assert {p.name for p in PROJECT.glob("*.py")} <= named


def test_every_other_command_of_the_readme_works(work):
    """In their order, in one folder, as somebody who reads from top to bottom types them."""
    write_parquet("Downloads/000_00000.parquet", documents(400))
    write_parquet("my.parquet", documents(300, seed=1), column="content")
    for name in ("prompt.txt", "prompts.txt"):
        (work / name).write_text("Once upon a time", encoding="utf-8")
    (work / "config").symlink_to(PROJECT / "config")
    transformers = pytest.importorskip("transformers")      # whose folders come before the hub
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=16, n_positions=64)).save_pretrained("gpt2")
    ran = 0
    for command in COMMANDS:
        words = shlex.split(command.replace("~/Downloads", "Downloads"))
        if (words[:3] == ["python3", "-m", "venv"]
                or words[0] in ("git", "cd", "pip", "ruff", "pytest")):
            continue
        if words[0] == "lm_eval":
            continue                        # needs the hub; test_export.py has local questions
        if "--download" in words:
            continue                        # needs the hub; test_prepare.py tests it on a stand-in
        if "plan.py" in words:
            continue                        # test_plan.py runs it and reads what it prints
        if words[0] == "torchrun":
            words = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
            words[words.index("train.py")] = str(PROJECT / "train.py")
        if any(w.endswith("train.py") for w in words):
            words += SMALL
            words += [] if any("resume" in w or "out_dir" in w for w in words) else ["--overwrite"]
        if any(w.endswith("sample.py") for w in words):
            words += ["--max_new_tokens=5", "--device=cpu"]
        if any(w.endswith("eval.py") for w in words):
            words += ["--max_documents=5", "--device=cpu"]
        done = script(*words[1:], cwd=work, check=False) if words[0] == "python" else \
            subprocess.run(words, cwd=work, text=True, capture_output=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        ran += 1
    assert ran >= 8


@pytest.mark.parametrize("path", [p for p in re.findall(r"\]\(([^)#:]+)\)", README)])
def test_links_of_the_readme_lead_somewhere(path):
    assert (PROJECT / path).exists()


def test_no_line_of_ours_is_left_without_a_license():
    assert "MIT License" in Path(PROJECT / "LICENSE").read_text()
