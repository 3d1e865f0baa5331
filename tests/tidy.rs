//! The rules of the house that decay first: dependency directions, where generated types and `unsafe` may stand.

#![expect(clippy::expect_used, clippy::panic, reason = "helpers of tests are test code too")]

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Rust files below a folder of the repository, with their path in it.
fn sources(folder: &str) -> Vec<(String, String)> {
    let mut files = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next).unwrap_or_else(|e| panic!("{}: {e}", next.display())).flatten() {
            let path = entry.path();
            if path.is_dir() && path.file_name().is_none_or(|name| name != "target") {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root()).expect("a path below the root").to_string_lossy().into_owned();
                files.push((name, fs::read_to_string(&path).expect("text")));
            }
        }
    }
    assert!(!files.is_empty(), "{folder} has no sources");
    files
}

/// The file without the tests at its end; single items for tests stand between others and are held to the same rules.
fn product(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod tests {").next().unwrap_or(text)
}

#[test]
fn rooms_depend_one_way() {
    let allowed: [(&str, &[&str]); 7] = [
        ("proto", &[]),
        ("trust", &[]),
        ("formats", &[]),
        ("nccl-rs", &[]),
        ("kernels", &["phalanx-formats", "nccl-rs"]),
        ("coordinator", &["phalanx-formats", "phalanx-proto", "phalanx-trust"]),
        ("worker", &["phalanx-formats", "phalanx-kernels", "phalanx-proto", "phalanx-trust", "nccl-rs"]),
    ];
    for (room, allowed) in allowed {
        let manifest = fs::read_to_string(root().join(room).join("Cargo.toml")).expect("a manifest");
        let dependencies = manifest.split("[dev-dependencies]").next().unwrap_or_default();
        for line in dependencies.lines().filter(|line| line.starts_with("phalanx-") || line.starts_with("nccl-rs")) {
            let name = line.split(['.', ' ', '=']).next().unwrap_or_default();
            assert!(allowed.contains(&name), "{room} depends on {name}");
        }
        if room == "coordinator" || room == "kernels" {
            let forbidden: &[&str] = if room == "coordinator" { &["candle", "cudarc"] } else { &["tokio", "tonic"] };
            for word in forbidden {
                assert!(!dependencies.contains(word), "{room} depends on {word}");
            }
        }
    }
}

#[test]
fn inside_the_coordinator_rooms_look_one_way() {
    let rules = [
        ("coordinator/src/engine/", ["crate::api", "crate::text", "crate::cluster"].as_slice()),
        ("coordinator/src/text/", &["crate::api", "crate::engine", "crate::cluster"]),
        ("coordinator/src/api/", &["crate::cluster"]),
        ("coordinator/src/cluster/", &["crate::text", "crate::dashboard"]),
        ("coordinator/src/dashboard/", &["crate::engine", "crate::text", "crate::api"]),
    ];
    for (file, text) in sources("coordinator/src") {
        for (room, forbidden) in rules.iter().filter(|(room, _)| file.starts_with(room)) {
            for word in *forbidden {
                assert!(!product(&text).contains(word), "{file} is in {room} and names {word}");
            }
        }
    }
}

#[test]
fn generated_types_stop_at_the_wire() {
    let allowed = [
        "proto/",
        "worker/src/session",
        "worker/src/agent/",
        "coordinator/src/engine/group",
        "coordinator/src/cluster/membership",
    ];
    for folder in ["coordinator/src", "worker/src", "kernels/src", "formats/src", "nccl-rs/src"] {
        for (file, text) in sources(folder) {
            if allowed.iter().all(|place| !file.starts_with(place)) {
                assert!(!product(&text).contains("pb::"), "{file} names generated types");
            }
        }
    }
}

#[test]
fn unsafe_code_stays_in_its_rooms() {
    let allowed = [
        "kernels/",
        "nccl-rs/",
        "worker/src/backend/",
        "worker/src/collective/",
        "worker/src/weights/",
        "formats/src/mapping",
    ];
    for folder in
        ["proto/src", "trust/src", "formats/src", "coordinator/src", "worker/src", "kernels/src", "nccl-rs/src"]
    {
        for (file, text) in sources(folder) {
            let code: String =
                text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
            if allowed.iter().all(|place| !file.starts_with(place)) {
                assert!(!code.contains("unsafe {") && !code.contains("unsafe fn"), "{file} has unsafe code");
            }
            assert!(
                !code.contains("unsafe impl Send") && !code.contains("unsafe impl Sync"),
                "{file} defeats the compiler"
            );
        }
    }
}

#[test]
fn every_module_says_what_it_owns() {
    for folder in [
        "proto/src",
        "trust/src",
        "formats/src",
        "kernels/src",
        "nccl-rs/src",
        "coordinator/src",
        "worker/src",
        "xtask/src",
    ] {
        for (file, text) in sources(folder) {
            assert!(text.starts_with("//!"), "{file} does not open with //!");
        }
    }
}

#[test]
fn tests_are_not_ignored() {
    for folder in ["proto", "trust", "formats", "kernels", "nccl-rs", "coordinator", "worker"] {
        for (file, text) in sources(folder) {
            assert!(!text.contains("#[ignore"), "{file} ignores a test");
        }
    }
}
