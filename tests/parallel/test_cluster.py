"""When several processes are one run, what is refused, and that a lone process asks nobody."""

from __future__ import annotations

import jax
import pytest
from jax._src import clusters

from mmjax.errors import UserError
from mmjax.main import main
from mmjax.parallel import cluster
from mmjax.parallel.cluster import Asked

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_GPUS_ON_NODE": "4",
}
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}


@pytest.fixture
def environment(monkeypatch):
    for name in (*SLURM, *OPEN_MPI, "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "JOB_COMPLETION_INDEX", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    "variables, alone",
    [
        ({}, True),
        (SLURM, False),
        ({**SLURM, "SLURM_NTASKS": "1"}, True),
        ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}, True),  # sbatch without srun
        (OPEN_MPI, False),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, True),  # a pod of its own
    ],
)
def test_a_cluster_is_seen(environment, variables, alone):
    for name, value in variables.items():
        environment.setenv(name, value)
    assert Asked().alone is alone
    assert Asked(processes=1).alone and not Asked("host:1234", 2, 0).alone


def test_a_tpu_slice_of_several_hosts_is_seen(environment):
    environment.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    environment.setenv("TPU_SKIP_MDS_QUERY", "1")
    environment.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    environment.setenv("MEGASCALE_NUM_SLICES", "1")
    assert Asked().alone
    environment.setenv("MEGASCALE_NUM_SLICES", "2")  # two slices of a host each
    assert not Asked().alone
    environment.setenv("MEGASCALE_NUM_SLICES", "1")
    environment.setenv("TPU_WORKER_HOSTNAMES", "worker-0,worker-1")
    assert not Asked().alone


@pytest.mark.parametrize(
    "variables, said",
    [
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, "indexed Kubernetes job"),
    ],
)
def test_a_cluster_that_does_not_say_enough_is_an_error(environment, variables, said):
    environment.setattr(clusters.K8sCluster, "is_env_present", lambda: False)  # as without the package
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(UserError, match=f"{said}.*--coordinator=HOST:PORT --processes=N --process=I"):
        Asked().alone


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--coordinator=host:1234"], "--coordinator without --processes and --process"),
        (["--processes=2", "--process=0"], "--processes and --process without --coordinator"),
        (["--coordinator=host", "--processes=2", "--process=0"], "--coordinator=host is not HOST:PORT"),
        (["--coordinator=host:1234", "--processes=2", "--process=2"], "--process=2 of --processes=2: they are numbered from 0"),
        (["--coordinator=host:1234", "--processes=2", "--process=0", "--heartbeat=0"], "1 second or more"),
        (["--coordinator=host:1234", "--processes=2", "--process=0", "--job=chat"], "--job=chat runs in one process"),
        (["--coordinator=host:1234", "--processes=2", "--process=0", "--job=plan"], "--job=plan runs in one process"),
    ],
)
def test_what_is_refused_before_anybody_is_waited_for(flags, said, capsys):
    assert main(["--config=configs/llava15.py:tiny", *flags]) == 1
    assert said in capsys.readouterr().err


def test_one_task_of_a_node_has_all_its_gpus(environment):
    joined = []
    environment.setattr(jax.distributed, "initialize", lambda *given, **named: joined.append((given, named)))
    for name, value in SLURM.items():
        environment.setenv(name, value)
    cluster._initialize(Asked(heartbeat=7))
    cluster._initialize(Asked("host:1234", 2, 1))
    (_, seen), (given, named) = joined
    assert seen["local_device_ids"] == [0, 1, 2, 3] and seen["heartbeat_timeout_seconds"] == 7
    assert given == ("host:1234", 2, 1) and named["cluster_detection_method"] == "deactivate"


def test_a_lone_process_waits_for_nobody():
    with cluster.joined(Asked(processes=1)), cluster.first_alone("here"):
        cluster.wait("here")
        assert cluster.from_first("here", lambda: [1, "a"]) == [1, "a"] and cluster.gathered("here", "text") == ["text"]
