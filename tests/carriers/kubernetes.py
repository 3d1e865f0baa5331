"""Checks deploy/kubernetes against the schemas of Kubernetes, strictly: unknown fields are errors.

LeaderWorkerSet is no part of Kubernetes: its pod template is checked as a pod, its other fields against those of its API.
"""

import pathlib
import sys

import kubernetes_validate
import yaml

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"
VERSION = "1.32"
SET_FIELDS = {"replicas", "startupPolicy", "rolloutStrategy", "networkConfig", "leaderWorkerTemplate"}
TEMPLATE_FIELDS = {"size", "restartPolicy", "workerTemplate", "leaderTemplate", "subGroupPolicy"}
START_POLICIES = {"LeaderCreated", "LeaderReady"}
RESTART_POLICIES = {"RecreateGroupOnPodRestart", "None"}


def check_set(document):
    spec = document["spec"]
    template = spec["leaderWorkerTemplate"]
    assert document["apiVersion"] == "leaderworkerset.x-k8s.io/v1", document["apiVersion"]
    assert set(spec) <= SET_FIELDS, set(spec) - SET_FIELDS
    assert set(template) <= TEMPLATE_FIELDS, set(template) - TEMPLATE_FIELDS
    assert spec.get("startupPolicy", "LeaderCreated") in START_POLICIES, spec["startupPolicy"]
    assert template.get("restartPolicy", "None") in RESTART_POLICIES, template["restartPolicy"]
    assert isinstance(template["size"], int) and template["size"] > 0, template["size"]
    for name in ["workerTemplate", "leaderTemplate"]:
        if name in template:
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": template[name]["spec"]}
            kubernetes_validate.validate(pod, VERSION, strict=True)


def main():
    count = 0
    for path in sorted(FOLDER.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            if document["kind"] == "LeaderWorkerSet":
                check_set(document)
            else:
                kubernetes_validate.validate(document, VERSION, strict=True)
            count += 1
            print(f"ok  {path.name}: {document['kind']} {document['metadata']['name']}")
    sys.exit(0 if count else "FAILED: nothing to check")


if __name__ == "__main__":
    main()
