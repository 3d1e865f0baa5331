//! What starts the processes on many machines: Ray, Slurm and Kubernetes, each by what lies in `deploy/`.
//!
//! Ray and Slurm are the real ones, with several nodes on this machine; the manifests are held against Kubernetes' schemas.
//! Each story is a program in `tests/carriers/`. Where the packages cannot be had these tests fail: that they ran is the point.

#![expect(clippy::expect_used, clippy::panic, reason = "helpers of tests are test code too")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::{golden, programs};

fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("carriers")
}

/// Runs a command to its end and shows what it said.
fn pass(mut command: Command) {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{said}");
    assert!(output.status.success(), "{command:?}: {said}");
}

/// The folder with the packages of PyPI that `list` names, installed where they are not there yet.
fn packages(name: &str, list: &[&str]) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cache/carriers").join(name);
    let (mark, wanted) = (folder.join("installed"), list.join(" "));
    if fs::read_to_string(&mark).is_ok_and(|installed| installed == wanted) {
        return folder;
    }
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).expect("a folder");
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target"]).arg(&folder).args(list);
    pass(pip);
    fs::write(mark, wanted).expect("a mark");
    folder
}

/// Debian's package, where its program is not there yet.
fn debian(program: &str, names: &[&str]) {
    let there = Command::new("sh").args(["-c", &format!("command -v {program}")]).output();
    if there.is_ok_and(|output| output.status.success()) {
        return;
    }
    let mut apt = Command::new("apt-get");
    apt.args(["install", "-y", "-qq", "--no-install-recommends"]).args(names).env("DEBIAN_FRONTEND", "noninteractive");
    pass(apt);
}

fn story(name: &str) -> Command {
    let mut command = Command::new("python3");
    command.arg(here().join(name));
    command
}

#[test]
fn slurm_carries_a_cluster_and_survives_a_lost_node() {
    debian("slurmctld", &["slurm-wlm", "munge"]);
    let mut slurm = story("slurm.py");
    slurm.arg(programs()).arg(golden("tiny-llama").folder);
    pass(slurm);
}

#[test]
fn ray_carries_a_cluster_and_survives_a_lost_node() {
    let folder = packages("ray", &["ray==2.60.0"]);
    let mut ray = story("on_ray.py");
    ray.arg(programs()).arg(golden("tiny-llama").folder).env("PYTHONPATH", folder);
    pass(ray);
}

#[test]
fn manifests_of_kubernetes_are_valid() {
    let folder = packages("kubernetes", &["kubernetes-validate==1.37.0", "pyyaml==6.0.3"]);
    let mut kubernetes = story("kubernetes.py");
    kubernetes.env("PYTHONPATH", folder);
    pass(kubernetes);
}
