"""The launchers: linted, dry runs against the commands they must be, and run against stand-ins for what is not here."""

import ast
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kubernetes_validate
import nbformat
import pytest
import yaml

from launch import check
from mmjax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), ROOT / "launch/slurm.sbatch"])
COMMAND = ["--config=configs/llava15.py:7b,lora", "--config.note=a b"]


@pytest.fixture
def bare(tmp_path):
    """An environment in which only a few programs exist: no gcloud, srun, kubectl, docker or nvidia-smi."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in "bash env sed dirname date mktemp rm mkdir cat grep tail sleep setsid nohup timeout sort python3".split():
        (programs / name).symlink_to(shutil.which(name))
    home = tmp_path / "home"
    home.mkdir()
    return {"PATH": str(programs), "HOME": str(home), "PYTHON": sys.executable}


def stand_in(environment, name, text):
    """A program of this name that runs `text`."""
    path = Path(environment["PATH"]) / name
    path.write_text(f"#!{shutil.which('bash')}\n{text}\n")
    path.chmod(0o755)


def launched(script, *arguments, env, **options):
    command = ["bash", str(ROOT / "launch" / script), *arguments]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


def dry(script, *arguments, env):
    done = launched(script, *arguments, "--dry-run", env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# ---- lint


def test_scripts_pass_shellcheck():
    done = subprocess.run(
        [Path(sys.executable).parent / "shellcheck", *SCRIPTS, ROOT / ".ci/run"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    for script in SCRIPTS:
        text = script.read_text()
        assert len(text.splitlines()) <= 175 and os.access(script, os.X_OK), script
        assert not re.findall(r"shellcheck disable=(?!SC2016)", text), script  # nor is anything switched off


def test_dockerfiles_pass_hadolint():
    files = sorted(ROOT.glob("launch/Dockerfile.*"))
    assert [file.suffix for file in files] == [".cuda", ".tpu"]
    done = subprocess.run([Path(sys.executable).parent / "hadolint", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for file in files:
        assert "USER 1000" in file.read_text() and 'ENTRYPOINT ["python", "-m", "mmjax.main"]' in file.read_text()
    assert {".git", ".venv", "workdirs"} <= set((ROOT / ".dockerignore").read_text().split())


@pytest.mark.parametrize("script", [script.name for script in SCRIPTS if script.name != "local.sh"])
def test_help_is_the_header(script, bare):
    done = launched(script, "--help", env=bare)
    assert done.returncode == 0 and script in done.stdout and "set -e" not in done.stdout and "#SBATCH" not in done.stdout


def test_notebook():
    book = nbformat.read(ROOT / "launch/colab.ipynb", 4)
    nbformat.validate(book)
    assert len(book.cells) <= 8
    for cell in book.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
            ast.parse(cell.source)


# ---- one machine


def test_gpu_dry_run(bare):
    python = bare["PYTHON"]
    assert dry("gpu.sh", *COMMAND, env=bare) == [
        f"{python} -m mmjax.main --config=configs/llava15.py:7b,lora '--config.note=a b'"
    ]
    joined = "--coordinator=127.0.0.1:PORT --processes=2"
    assert dry("gpu.sh", "--processes=2", "--workdir=w", env=bare | {"CUDA_VISIBLE_DEVICES": "3,5"}) == [
        f"env CUDA_VISIBLE_DEVICES=3 {python} -m mmjax.main --workdir=w {joined} --process=0 > w/logs/0.log",
        f"env CUDA_VISIBLE_DEVICES=5 {python} -m mmjax.main --workdir=w {joined} --process=1 > w/logs/1.log",
    ]


def test_gpu_needs_gpus(bare):
    done = launched("gpu.sh", *COMMAND, env=bare)
    assert done.returncode == 2 and "no NVIDIA driver" in done.stderr
    done = launched("gpu.sh", "--processes=3", *COMMAND, env=bare | {"CUDA_VISIBLE_DEVICES": "3,5"})
    assert done.returncode == 2 and "there are 2 GPUs (3 5)" in done.stderr


# Stands in for mmjax: the flags it was given, then what MODE says; a SIGTERM saves, and ends with 143.
PROCESS = """
trap 'echo saved; exit 143' TERM
i=${*: -1}; i=${i#--process=}
echo "process $i: $*"
[[ $MODE != dies || $i != 1 ]] || { echo "out of memory"; exit 7; }
[[ $MODE == ends ]] || for k in {1..3000}; do sleep 0.05; done
"""


def test_gpu_processes(bare, tmp_path):
    stand_in(bare, "process", PROCESS)
    env = bare | {"JAX_PLATFORMS": "cpu"}
    done = launched("gpu.sh", "--processes=2", f"--logs={tmp_path}", "--", "process", env=env | {"MODE": "ends"})
    assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / f"{i}.log").read_text() for i in (0, 1))
    assert first == done.stdout  # the first one's log is shown
    given = re.fullmatch(r"process 0: --coordinator=127\.0\.0\.1:(\d+) --processes=2 --process=0\n", first)
    assert given and second == f"process 1: --coordinator=127.0.0.1:{given[1]} --processes=2 --process=1\n"


def test_gpu_one_process_dies(bare, tmp_path):
    stand_in(bare, "process", PROCESS)
    env = bare | {"JAX_PLATFORMS": "cpu", "MODE": "dies"}
    done = launched("gpu.sh", "--processes=2", f"--logs={tmp_path}", "--", "process", env=env)
    assert done.returncode == 7  # its exit code is passed on
    assert "process 1 failed (exit code 7)" in done.stderr and "out of memory" in done.stderr
    assert "saved" in (tmp_path / "0.log").read_text()  # and the other one was asked to end


@pytest.mark.parametrize("group", [False, True])
def test_gpu_passes_sigterm_on(bare, tmp_path, group):
    stand_in(bare, "process", PROCESS)
    env = bare | {"JAX_PLATFORMS": "cpu", "MODE": "runs"}
    command = ["bash", str(ROOT / "launch/gpu.sh"), "--processes=2", f"--logs={tmp_path}", "--", "process"]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=env, start_new_session=True, **silent) as running:
        wait_for(lambda: all((tmp_path / f"{i}.log").exists() and (tmp_path / f"{i}.log").read_text() for i in (0, 1)))
        (os.killpg if group else os.kill)(running.pid, signal.SIGTERM)
        assert running.wait(120) == 143
    assert all("saved" in (tmp_path / f"{i}.log").read_text() for i in (0, 1))


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# ---- SLURM


def test_slurm_dry_run(bare):
    python = ROOT / ".venv/bin/python"
    assert dry("slurm.sbatch", "--config=c.py", "--workdir=/shared/w", env=bare) == [
        f"srun --label timeout 600 {python} -m launch.check --platform=gpu --devices=GPUS",
        f"srun --kill-on-bad-exit=1 {python} -m mmjax.main --config=c.py --workdir=/shared/w",
    ]
    done = launched("slurm.sbatch", "--config=c.py", env=bare)
    assert done.returncode == 1 and "say --workdir=DIR" in done.stderr


def test_slurm_saves_and_queues_again(bare, tmp_path):
    env = bare | {"SLURM_JOB_ID": "5", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NUM_NODES": "2", "LOG": str(tmp_path / "log")}
    env |= {"SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "8", "VENV": str(Path(sys.executable).parents[1])}
    stand_in(env, "srun", f'echo "srun $*" >> $LOG; [[ $* == *launch.check* ]] && exit; MODE=runs; {PROCESS}')
    stand_in(env, "squeue", "echo $STATE")
    stand_in(env, "scontrol", 'echo "scontrol $*" >> $LOG')
    log = tmp_path / "log"
    for state, again in (("RUNNING", ["scontrol requeue 5"]), ("COMPLETING", [])):  # at the time limit; when cancelled
        log.write_text("")
        command = ["bash", str(ROOT / "launch/slurm.sbatch"), "--config=c.py", "--workdir=w"]
        with subprocess.Popen(command, env=env | {"STATE": state}, stderr=subprocess.DEVNULL) as running:
            wait_for(lambda: "mmjax.main" in log.read_text())
            running.send_signal(signal.SIGTERM)
            assert running.wait(120) == 143
        checked, started, *rest = log.read_text().splitlines()
        assert checked.endswith("-m launch.check --platform=gpu --devices=16")
        assert started.endswith("-m mmjax.main --config=c.py --workdir=w")
        assert rest == again


def test_slurm_refuses_hidden_gpus(bare):
    env = bare | {"SLURM_JOB_ID": "5", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "1"}
    done = launched("slurm.sbatch", "--workdir=w", env=env | {"VENV": str(Path(sys.executable).parents[1])})
    assert done.returncode == 1 and "8 tasks on a machine with 1 GPUs" in done.stderr


# ---- Cloud TPU

PLACE = "--zone=us-east5-b"


def test_tpu_dry_run(bare):
    lines = dry("tpu_pod.sh", "run", "--tpu=pod", PLACE, *COMMAND, "--workdir=gs://b/w", env=bare)
    ssh = f"gcloud compute tpus tpu-vm ssh pod {PLACE} --worker=all --output-directory=LOGS/0 '--command="
    assert lines[0].startswith(f"gcloud compute tpus tpu-vm describe pod {PLACE} ")
    assert lines[1].startswith(ssh)
    assert lines[2].startswith("bash -c 'git ls-files")
    assert lines[3] == f"gcloud compute tpus tpu-vm scp LOGS/mmjax.tar.gz pod: {PLACE} --worker=all"
    assert lines[4].startswith(ssh) and lines[4].endswith("&& bash mmjax/launch/tpu_worker.sh setup'")
    assert lines[5] == f"{ssh}bash mmjax/launch/tpu_worker.sh mount b'"
    assert lines[6] == f"{ssh}bash mmjax/launch/tpu_worker.sh check CHIPS'"
    given = r"--config=configs/llava15.py:7b\,lora --config.note=a\ b --workdir=../mmjax-buckets/b/w"
    assert lines[7] == f"{ssh}bash mmjax/launch/tpu_worker.sh start {given}'"
    assert lines[8] == f"gcloud compute tpus tpu-vm ssh pod {PLACE} --worker=0 '--command=bash mmjax/launch/tpu_worker.sh follow'"
    assert len(lines) == 9


def test_tpu_several_slices(bare):
    assert dry("tpu_pod.sh", "create", "--tpu=pod", "--type=v6e-16", "--slices=2", "--spot", PLACE, env=bare) == [
        f"gcloud compute tpus queued-resources create pod {PLACE} --node-count=2 --node-prefix=pod --accelerator-type=v6e-16 "
        "--runtime-version=v2-alpha-tpuv6e --scopes=cloud-platform --spot"
    ]
    lines = dry("tpu_pod.sh", "run", "--tpu=pod-0,pod-1", "--workdir=gs://b/w", env=bare)
    for slice in (0, 1):
        told = f"MEGASCALE_COORDINATOR_ADDRESS=ADDRESS MEGASCALE_NUM_SLICES=2 MEGASCALE_SLICE_ID={slice}; bash mmjax/launch/tpu_worker.sh start"
        assert sum(told in line and f" pod-{slice} " in line for line in lines) == 1


# Stands in for gcloud: two slices that differ and one that is gone; worker MISSING does not answer; FAULT is in the step of that name.
GCLOUD = """
echo "$*" >> $LOG
case "$*" in
  *"auth list"*) echo me ;;
  *"describe gone"*) exit 1 ;;
  *"describe old"*) echo "READY v5litepod-8 2 10.0.0.9" ;;
  *"describe ill"*) echo "PREEMPTED v6e-8 2 10.0.0.8" ;;
  *describe*) echo "READY v6e-8 2 10.0.0.2" ;;
  *"--worker=all --output-directory"*)
    for argument; do [[ $argument != --output-directory=* ]] || folder=${argument#*=}; done
    for worker in 0 1; do
      said="mmjax: done"
      [[ -z ${FAULT:-} || $worker == 0 || "$*" != *"$FAULT"* ]] || said="mmjax: gs://b is not writable"
      [[ ${MISSING:-} != $worker ]] || said="ssh: connect to host 10.0.0.3 port 22: Connection timed out"
      echo "$said" > $folder/$worker.log
    done ;;
  *follow*) echo following; [[ ${ENDS:-0} != never ]] || exec sleep 60; exit ${ENDS:-0} ;;
esac
"""


def test_tpu_run_against_a_stand_in(bare, tmp_path):
    stand_in(bare, "gcloud", GCLOUD)
    for name in ("git", "tar", "gzip"):
        (Path(bare["PATH"]) / name).symlink_to(shutil.which(name))
    log = tmp_path / "log"

    def run(tpu="pod", **environment):
        log.write_text("")
        command = ("tpu_pod.sh", "run", f"--tpu={tpu}", PLACE, "--config=c.py", "--workdir=gs://b/w")
        return launched(*command, env=bare | {"LOG": str(log)} | environment)

    done = run(ENDS="143")
    assert done.returncode == 143, done.stderr  # the exit code of the run
    assert "check 8" in log.read_text()  # as many chips as the type says
    assert "start" in log.read_text()

    done = run(MISSING="1")
    assert done.returncode == 1 and "worker 1 of pod does not answer" in done.stderr and "worker 0 of" not in done.stderr
    assert "start" not in log.read_text()
    done = run(FAULT="mount b")
    assert (
        done.returncode == 1
        and "worker 1 of pod:\nmmjax: gs://b is not writable" in done.stderr
        and "start" not in log.read_text()
    )
    done = run("ill")
    assert done.returncode == 1 and "ill is PREEMPTED, not READY" in done.stderr
    done = run("gone")
    assert done.returncode == 1 and "there is no slice gone" in done.stderr
    done = run("pod,old")
    assert done.returncode == 1 and "the slices of one run are alike" in done.stderr
    done = run(ENDS="255")
    assert done.returncode == 1 and "the run goes on: launch/tpu_pod.sh logs --tpu=pod" in done.stderr


def test_tpu_stops_on_ctrl_c(bare, tmp_path):
    stand_in(bare, "gcloud", GCLOUD)
    log = tmp_path / "log"
    command = ["env", "--default-signal=INT", "bash", str(ROOT / "launch/tpu_pod.sh"), "logs", "--tpu=pod"]
    env = bare | {"LOG": str(log), "ENDS": "never"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True) as following:
        assert following.stdout is not None and following.stdout.readline() == b"following\n"
        os.killpg(following.pid, signal.SIGINT)  # as a terminal does
        assert following.wait(120) == 130
    assert log.read_text().rstrip().endswith("--command=bash mmjax/launch/tpu_worker.sh stop")


def test_tpu_worker_starts_follows_and_stops(bare, tmp_path):
    checkout = tmp_path / "mmjax"
    (checkout / "launch").mkdir(parents=True)
    (checkout / ".venv/bin").mkdir(parents=True)
    shutil.copy(ROOT / "launch/tpu_worker.sh", checkout / "launch")
    stand_in(bare, "python", PROCESS)
    (Path(bare["PATH"]) / "python").rename(checkout / ".venv/bin/python")

    def worker(*arguments, mode="runs"):
        command = ["bash", str(checkout / "launch/tpu_worker.sh"), *arguments]
        return subprocess.run(command, env=bare | {"MODE": mode}, capture_output=True, text=True, timeout=300)

    started = worker("start", "--config=c.py:a b", mode="ends")
    assert started.stdout == "mmjax: done\n"
    followed = worker("follow")
    assert followed.returncode == 0 and "the run ended with exit code 0" in followed.stdout
    assert "-u -m mmjax.main --config=c.py:a b" in (Path(bare["HOME"]) / "mmjax-run/log").read_text()

    assert worker("start").stdout == "mmjax: done\n"
    state = Path(bare["HOME"]) / "mmjax-run"
    wait_for(lambda: (state / "pid").exists() and (state / "log").read_text().count("process ") == 2)
    assert "a run is going on" in worker("start").stdout
    assert worker("stop").stdout == "mmjax: done\n"
    assert worker("follow").returncode == 143 and "saved" in (state / "log").read_text()


# ---- GKE


def jobset(env, *arguments):
    own = ("--name=llava", "--image=r/mmjax:1", "--bucket=b", "--service-account=sa", *arguments)
    return yaml.safe_load("\n".join(dry("gke_jobset.sh", *own, "--workdir=gs://b/w", '--config.note={"a": "b & c"}', env=env)))


@pytest.mark.parametrize("topology, hosts, chips, slices", [("2x4", 1, 8, 1), ("4x4", 4, 4, 2), ("16x16", 64, 4, 1)])
def test_jobset(bare, topology, hosts, chips, slices):
    made = jobset(bare, f"--topology={topology}", f"--slices={slices}")
    assert (made["apiVersion"], made["kind"], made["metadata"]["name"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet", "llava")
    # JobSet's own fields, as its v1alpha2 defines them
    assert set(made["spec"]) == {"network", "failurePolicy", "replicatedJobs"}
    assert made["spec"]["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    policy = made["spec"]["failurePolicy"]
    assert set(policy) == {"maxRestarts", "restartStrategy", "rules"} and policy["restartStrategy"] in (
        "Recreate",
        "BlockingRecreate",
    )
    assert [set(rule) for rule in policy["rules"]] == [{"name", "action", "onJobFailureReasons"}]
    (slice,) = made["spec"]["replicatedJobs"]
    assert set(slice) == {"name", "replicas", "template"} and slice["replicas"] == slices
    # the job in it, by Kubernetes' own schema: no unknown field, no wrong type
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "llava"}, **slice["template"]}
    kubernetes_validate.validate(job, "1.31", strict=True)
    spec = job["spec"]
    assert (spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (hosts, hosts, 0)
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": topology,
    }
    assert pod["terminationGracePeriodSeconds"] >= 120 and pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert container["args"] == ["--workdir=/bucket/w", '--config.note={"a": "b & c"}']
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--topology=3x3"], "v5e and v6e slices are 1x1"),
        (["--topology=2x4", "--slices=2"], "several slices of one host each cannot be joined"),
        (["--topology=4x4", "--accelerator=h100"], "tpu-v6e-slice (v6e) or tpu-v5-lite-podslice (v5e)"),
        (["--topology=4x4", "--workdir=/tmp/x"], "what a container writes elsewhere is lost"),
        ([], "say --topology=..."),
    ],
)
def test_jobset_refuses(bare, arguments, said):
    done = launched("gke_jobset.sh", "--dry-run", "--name=llava", "--image=r/mmjax:1", "--bucket=b", *arguments, env=bare)
    assert done.returncode == 1 and said in done.stderr


# ---- the check before a run


@pytest.mark.parametrize(
    "releases, driver, said",
    [
        ({"jax": "0.10.2", "jax-cuda12-plugin": "0.10.2"}, "550.54.15", None),
        ({"jax": "0.10.2", "jax-cuda13-plugin": "0.10.2"}, "580.95.05", None),
        (
            {"jax": "0.10.2", "jax-cuda13-plugin": "0.10.2"},
            "550.54.15",
            '580.65 or newer, and this one is 550.54.15: renew it, or install "jax[cuda12]"',
        ),
        ({"jax": "0.10.2", "jax-cuda12-plugin": "0.10.2"}, "470.1", "driver of 525.60 or newer"),
        ({"jax": "0.10.2"}, "550.54.15", 'pip install "jax[cuda12]==0.10.2"'),
        ({"jax": "0.10.2", "jax-cuda12-plugin": "0.10.2"}, None, "no NVIDIA driver"),
        (
            {"jax": "0.10.2", "jax-cuda12-plugin": "0.10.2", "jax-cuda13-plugin": "0.10.2"},
            "580.95.05",
            "are installed, and JAX takes one",
        ),
    ],
)
def test_driver_and_build_fit(releases, driver, said):
    with pytest.raises(UserError, match=re.escape(said)) if said else contextlib.nullcontext():
        check.check_driver(releases, driver)


def test_devices_are_counted(capsys):
    check.check_devices("cpu", 8)
    assert "8 x cpu in 1 processes; jax " in capsys.readouterr().out
    with pytest.raises(UserError, match="16 devices are expected, and 1 processes see 8"):
        check.check_devices("cpu", 16)
    with pytest.raises(UserError, match=r'JAX runs on cpu, not on tpu .*: pip install "jax\[tpu\]=='):
        check.check_devices("tpu", 8)


def test_readme_names_every_file():
    text = (ROOT / "launch/README.md").read_text()
    for file in (ROOT / "launch").iterdir():
        if file.name not in ("README.md", "__pycache__"):
            assert file.name in text, file.name
