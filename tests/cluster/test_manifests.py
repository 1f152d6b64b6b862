"""The cluster manifests: Ray's own schema for virtual machines, the fields of KubeRay's v1 API for Kubernetes."""

import copy
import shlex
from pathlib import Path

import pytest
import yaml

from jobs.core.command import parse
from jobs.core.options import valid_keys

REPOSITORY = Path(__file__).resolve().parents[2]
VM = REPOSITORY / "cluster/vm/cluster.yaml"
RAYJOB = REPOSITORY / "cluster/kuberay/rayjob.yaml"
GPU = "nvidia.com/gpu"

# The fields of KubeRay's ray.io/v1 types that the manifest may use: a field that is none of these is a typing error.
FIELDS = {
    "job": {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "rayClusterSpec"},
    "cluster": {
        *("rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions"),
        *("headGroupSpec", "workerGroupSpecs"),
    },
    "autoscaler": {"upscalingMode", "idleTimeoutSeconds", "resources"},
    "head": {"serviceType", "enableIngress", "rayStartParams", "template"},
    "workers": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
}


@pytest.fixture(scope="module")
def vm() -> dict:
    return yaml.safe_load(VM.read_text())


@pytest.fixture(scope="module")
def job() -> dict:
    manifest = yaml.safe_load(RAYJOB.read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    return manifest["spec"]


@pytest.fixture(scope="module")
def groups(job) -> dict[str, dict]:
    cluster = job["rayClusterSpec"]
    return {"head": cluster["headGroupSpec"], **{g["groupName"]: g for g in cluster["workerGroupSpecs"]}}


def prepared(config: dict) -> dict:
    """Complete and check a launcher config as `ray up` does before it talks to the cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(config))
    validate_config(config)
    return config


def test_ray_accepts_the_launcher_config(vm):
    config = prepared(vm)
    head, gpu = (config["available_node_types"][name] for name in ("head", "gpu"))
    assert config["head_node_type"] == "head"
    assert (head["min_workers"], head["max_workers"]) == (0, 0)
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, 4)
    assert (head["resources"], gpu["resources"]["GPU"]) == ({"CPU": 0}, 1)
    assert gpu["node_config"]["InstanceType"] != head["node_config"]["InstanceType"]
    assert any("-c constraints.txt" in command for command in config["worker_setup_commands"])


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"max_worker": 4}, "max_worker"),
        ({"auth": {"user": "ubuntu"}}, "user"),
        ({"head_node_type": "boss"}, "head_node_type"),
        ({"max_workers": "four"}, "four"),
    ],
)
def test_ray_refuses_a_broken_launcher_config(vm, broken, said):
    import jsonschema

    with pytest.raises((jsonschema.ValidationError, ValueError), match=said):
        prepared({**vm, **broken})


def test_launcher_exposes_nothing_but_ssh(vm):
    start = [vm["head_start_ray_commands"][-1], vm["worker_start_ray_commands"][-1]]
    assert all("RAY_AUTH_MODE=token" in command and "RAY_USAGE_STATS_ENABLED=0" in command for command in start)
    assert "--dashboard-host=127.0.0.1" in start[0]
    assert "security_group" not in vm["provider"]  # it can only open more


def test_launcher_mounts_files_of_this_repository(vm):
    own = [path for path in vm["file_mounts"].values() if not path.startswith("~")]
    assert {"actors", "cluster", "jobs", "pyproject.toml", "constraints.txt"} <= set(own)
    assert [path for path in own if not (REPOSITORY / path).exists()] == []


def commented_submit() -> list[str]:
    """Return the words of the `ray job submit` in the launcher config's comment."""
    comment = " ".join(line.removeprefix("#").strip() for line in VM.read_text().splitlines() if line.startswith("#"))
    command = comment.split("ray job submit ", 1)[1].split("ray down")[0]
    return shlex.split(command.replace("\\", ""))


def entrypoint_of(job: dict) -> list[str]:
    return shlex.split(job["entrypoint"])


@pytest.mark.parametrize("source", ["rayjob", "launcher comment"])
def test_the_command_is_one_that_this_repository_has(job, source, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    words = entrypoint_of(job) if source == "rayjob" else commented_submit()
    words = words[words.index("python") :]
    package, module = words[2].split(".")
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert words[1] == "-m" and package == "jobs"
    assert (REPOSITORY / "jobs" / f"{module}.py").is_file()
    assert (REPOSITORY / options["--config"]).is_file()
    assert {key.removeprefix("--") for key in options} - {"config"} <= set(valid_keys())
    config = parse(words[3:])
    assert config.run_dir.startswith("/shared/") and config.data.root.startswith("/shared/")


def test_a_misspelt_override_would_be_noticed(job, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    words = entrypoint_of(job)[3:]
    with pytest.raises(ValueError, match="did you mean 'run_dir'"):
        parse(["--rundir" if word == "--run_dir" else word for word in words])


def test_rayjob_has_only_fields_that_kuberay_knows(job):
    cluster = job["rayClusterSpec"]
    parts = {"job": [job], "cluster": [cluster], "autoscaler": [cluster["autoscalerOptions"]]}
    parts |= {"head": [cluster["headGroupSpec"]], "workers": cluster["workerGroupSpecs"]}
    unknown = {name: set(part) - FIELDS[name] for name, all_ in parts.items() for part in all_}
    assert set().union(*unknown.values()) == set()


def test_rayjob_ends_and_scales(job):
    cluster = job["rayClusterSpec"]
    assert job["shutdownAfterJobFinishes"] is True and job["ttlSecondsAfterFinished"] > 0
    assert cluster["enableInTreeAutoscaling"] is True
    for group in cluster["workerGroupSpecs"]:
        assert 1 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_rayjob_runs_the_ray_of_the_constraints(job):
    pinned = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if line.startswith("ray==")]
    assert pinned == [f"ray=={job['rayClusterSpec']['rayVersion']}"]


def test_gpus_are_the_workers_only_and_fit_a_replica(groups, job, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    replicas = parse(entrypoint_of(job)[3:]).replicas
    for name, group in groups.items():
        for container in group["template"]["spec"]["containers"]:
            resources = container["resources"]
            assert resources["requests"] == resources["limits"]
            assert resources["requests"].get(GPU) == (None if name == "head" else "1")
            if name != "head":
                assert float(resources["requests"]["cpu"]) >= replicas.cpus and replicas.gpus <= 1
    assert groups["head"]["rayStartParams"]["num-cpus"] == "0"


def test_all_groups_mount_the_shared_claim_and_memory_for_the_object_store(groups):
    claims = set()
    for group in groups.values():
        spec = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        (container,) = spec["containers"]
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        claims.add(mounts["/shared"]["persistentVolumeClaim"]["claimName"])
        memory = mounts["/dev/shm"]["emptyDir"]
        assert memory["medium"] == "Memory"
        assert int(group["rayStartParams"]["object-store-memory"]) < gibibytes(memory["sizeLimit"])
        assert gibibytes(memory["sizeLimit"]) < gibibytes(container["resources"]["requests"]["memory"])
    assert len(claims) == 1


def test_pods_share_image_environment_and_nothing_is_exposed(groups, job):
    containers = [group["template"]["spec"]["containers"][0] for group in groups.values()]
    assert len({container["image"] for container in containers}) == 1
    for container in containers:
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
        assert environment["HF_HOME"].startswith("/shared/")
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert (groups["head"]["serviceType"], groups["head"]["enableIngress"]) == ("ClusterIP", False)
    assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    strings = [value for group in groups.values() for value in group["rayStartParams"].values()]
    assert all(isinstance(value, str) for value in strings)  # KubeRay refuses numbers here


def gibibytes(quantity: str) -> int:
    assert quantity.endswith("Gi")
    return int(quantity.removesuffix("Gi")) * 2**30
