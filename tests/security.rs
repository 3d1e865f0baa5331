//! A stranger's machine: what it tries at a head that lets machines join, and what it is told. docs/security.md is the list.

#![expect(clippy::expect_used, reason = "helpers of tests are test code too")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use harness::{Cluster, Finished, Node, golden, wait_for};
use serde_json::{Value, json};

/// A head that other machines reach.
fn open_to_machines(flags: &[&str]) -> Cluster {
    // The name of this machine need not be known to itself.
    Cluster::start_with(1, &[&["--cluster-host", "0.0.0.0", "--advertise-address", "127.0.0.1"], flags].concat())
}

fn join(node: &Node, cluster: &Cluster, flags: &[&str]) -> Finished {
    node.run("worker", &[&["join", "--address", &cluster.address, "--num-gpus", "1"], flags].concat())
}

#[track_caller]
fn refused(tried: &Finished, words: &[&str]) {
    assert_eq!(tried.code, 1, "{tried:?}");
    for word in words {
        assert!(tried.stderr.contains(word), "{word:?} is not in: {}", tried.stderr);
    }
}

#[test]
fn strangers_machines_do_not_join() {
    let (cluster, other_cluster) = (open_to_machines(&[]), open_to_machines(&[]));
    let head = &cluster.node;
    let stranger = Node::new();
    refused(&join(&stranger, &cluster, &[]), &["token only", "coordinator token create"]);
    let old = head.make_token(&["--ttl", "0s"]);
    refused(&join(&stranger, &cluster, &["--token", &old]), &["has expired"]);
    let revoked = head.make_token(&[]);
    let id = revoked.split('-').nth(1).expect("an id");
    assert_eq!(head.run("coordinator", &["token", "revoke", id]).code, 0);
    refused(&join(&stranger, &cluster, &["--token", &revoked]), &["was revoked"]);
    let guess = revoked.replace(revoked.split('-').nth(2).expect("a secret"), &"0".repeat(32));
    refused(&join(&stranger, &cluster, &["--token", &guess]), &["not one of this head"]);
    let admin = head.make_token(&["--scope", "admin"]);
    refused(&join(&stranger, &cluster, &["--token", &admin]), &["does not have the scope join"]);
    // Who answers is another head than the one that the token names: so it is with somebody in between.
    let elsewhere = other_cluster.node.make_token(&[]);
    refused(&join(&stranger, &cluster, &["--token", &elsewhere]), &["not the head that the token names"]);
    refused(&join(&stranger, &cluster, &["--insecure"]), &["speaks TLS"]);
    assert_eq!(join(&stranger, &cluster, &["--token", "phxt-1"]).code, 2);
    // A certificate of one cluster is nothing to another one, and nothing is sent there.
    let member = Node::new().with_token_of(&other_cluster.node);
    assert_eq!(join(&member, &other_cluster, &[]).code, 0);
    assert_eq!(member.run("worker", &["leave"]).code, 0);
    let member = member.without_token();
    refused(&join(&member, &cluster, &[]), &["not the head"]);
    assert_eq!(cluster.status().nodes.len(), 1, "nobody of all these joined");
}

#[test]
fn strangers_commands_are_refused() {
    let cluster = open_to_machines(&[]);
    let stranger = Node::new();
    let ask = |flags: &[&str]| {
        stranger.run("coordinator", &[&["status", "--json", "--address", &cluster.address], flags].concat())
    };
    refused(&ask(&[]), &["no token", "--token"]);
    refused(&ask(&["--insecure"]), &["speaks TLS"]);
    refused(&ask(&["--token", &cluster.node.make_token(&[])]), &["does not have the scope admin"]);
    let model = golden("tiny-llama").folder;
    let deploy = ["serve", model.to_str().expect("a path"), "--address", &cluster.address];
    refused(&stranger.run("coordinator", &deploy), &["no token"]);
    refused(&stranger.run("coordinator", &["stop", "--address", &cluster.address]), &["no token"]);
    let admin = cluster.node.make_token(&["--scope", "admin"]);
    assert_eq!(ask(&["--token", &admin]).code, 0);
    let code = ["--env", "LD_PRELOAD=/tmp/x.so", "--token", &admin];
    let loaded = stranger.run("coordinator", &[&deploy[..], &code[..]].concat());
    assert!(loaded.code == 2 && loaded.stderr.contains("LD_PRELOAD"), "{loaded:?}");
    assert_eq!(cluster.node.run("coordinator", &["status", "--address", &cluster.address]).code, 0, "its own home may");
}

/// Whoever speaks plain text to the cluster port hears, in his own language, that it is the wrong one.
#[test]
fn plain_text_is_answered_with_words() {
    let cluster = open_to_machines(&[]);
    let port = cluster.address.rsplit_once(':').expect("a port").1;
    let say = |words: &[u8]| {
        let mut stream = TcpStream::connect(format!("127.0.0.1:{port}")).expect("connects");
        stream.write_all(words).expect("writes");
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    };
    for words in ["GET / HTTP/1.1\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "hello\n"] {
        let answer = say(words.as_bytes());
        assert!(answer.contains("speaks TLS"), "{words:?}: {answer:?}");
    }
    assert_eq!(cluster.node.run("coordinator", &["status"]).code, 0);
}

#[test]
fn a_revoked_node_is_cut_off() {
    let cluster = open_to_machines(&[]);
    let member = Node::new().with_token_of(&cluster.node);
    assert_eq!(join(&member, &cluster, &[]).code, 0);
    let id = fs::read_to_string(member.home().join("node_id")).expect("an id").trim().to_owned();
    let revoked = cluster.node.run("coordinator", &["token", "revoke", "--node", &id]);
    assert_eq!(revoked.code, 0, "{revoked:?}");
    assert!(revoked.stderr.contains("still opens the cluster"), "the token is named: {}", revoked.stderr);
    let node = wait_for("the node to be gone", || {
        cluster
            .status()
            .nodes
            .into_iter()
            .find(|node| node.id == id && node.state != "alive" && node.state != "suspect")
    });
    assert!(node.reason.contains("revoked"), "{node:?}");
    wait_for("its agent to end", || (member.run("worker", &["leave"]).code == 1).then_some(()));
    refused(&join(&member, &cluster, &[]), &["was revoked"]);
}

#[test]
fn certificates_are_renewed_in_time() {
    let cluster = open_to_machines(&["--certificate-lifetime", "6s"]);
    let serials = || {
        let listed = cluster.node.run("coordinator", &["token", "list", "--json"]);
        let list: Value = serde_json::from_str(&listed.stdout).expect("one object");
        let nodes = list["nodes"].as_array().expect("nodes").clone();
        nodes.into_iter().map(|node| node["serial"].to_string()).collect::<Vec<_>>()
    };
    let first = serials();
    assert_eq!(first.len(), 1);
    wait_for("the next certificate", || (serials() != first).then_some(()));
    // A rank dials with what lies there now.
    cluster.serve(&golden("tiny-llama").folder, "m", &[]);
    assert_eq!(cluster.status().nodes[0].state, "alive");
}

#[test]
fn every_route_needs_a_key_once_there_is_one() {
    let cluster = Cluster::start(1);
    let (status, text) = cluster.http.get("/openapi.json");
    assert_eq!(status, 200);
    let document: Value = serde_json::from_str(&text).expect("JSON");
    let key = cluster.node.run("coordinator", &["key", "create", "--name", "a"]);
    assert_eq!(key.code, 0, "{key:?}");
    let open = ["/health", "/health/live", "/ping"];
    wait_for("the head to know the key", || (cluster.http.get("/v1/models").0 == 401).then_some(()));
    let mut num_routes = 0;
    for (path, methods) in document["paths"].as_object().expect("paths") {
        let path = path.replace(['{', '}'], "");
        let status = match methods.get("post") {
            Some(_) => cluster.http.post(&path, &json!({"model": "m"})).status,
            None => cluster.http.get(&path).0,
        };
        assert_eq!(status == 401, !open.contains(&path.as_str()), "{path} answers {status}");
        num_routes += 1;
    }
    for path in ["/metrics", "/docs", "/openapi.json", "/version", "/nowhere"] {
        assert_eq!(cluster.http.get(path).0, 401, "{path}");
    }
    assert!(num_routes >= 10, "{num_routes}");
}

/// Addresses that a process listens on, as the kernel tells.
fn listens(pid: u32) -> Vec<(String, u16)> {
    let mut sockets = BTreeMap::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6", "/proc/net/udp", "/proc/net/udp6"] {
        for line in fs::read_to_string(table).unwrap_or_default().lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            // 0A: listening; 07: a datagram socket that is bound.
            if fields[3] == "0A" || (fields[3] == "07" && table.contains("udp")) {
                let (ip, port) = fields[1].rsplit_once(':').expect("a port");
                let host = if ip.chars().all(|digit| digit == '0') { "any" } else { "loopback or one address" };
                let port = u16::from_str_radix(port, 16).expect("a port");
                sockets.insert(format!("socket:[{}]", fields[9]), (host.to_owned(), port));
            }
        }
    }
    let files = fs::read_dir(format!("/proc/{pid}/fd")).expect("the process is there");
    let names = files.flatten().filter_map(|file| fs::read_link(file.path()).ok());
    names.filter_map(|name| sockets.get(name.to_str()?).cloned()).collect()
}

/// Rows of the table of ports in the document: who listens, and on which default port.
fn documented() -> Vec<(String, String)> {
    let text =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/security.md")).expect("a document");
    let section = text.split("## What listens").nth(1).and_then(|rest| rest.split("\n## ").next()).expect("the table");
    let rows = section.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| port"));
    let cells = rows.map(|line| line.split('|').map(str::trim).collect::<Vec<_>>());
    cells.map(|cells| (cells[1].to_owned(), cells[2].to_owned())).collect()
}

#[test]
fn what_listens_is_what_the_document_lists() {
    let cluster = open_to_machines(&[]);
    let member = Node::new().with_token_of(&cluster.node);
    assert_eq!(join(&member, &cluster, &[]).code, 0);
    let spread = ["--tensor-parallel-size", "2", "--placement-strategy", "strict-spread", "--dtype", "float32"];
    cluster.serve(&golden("tiny-llama").folder, "m", &spread);
    let status = cluster.status();
    let port = |url: &str| url.rsplit_once(':').expect("a port").1.parse::<u16>().expect("a port");
    let mut expected = vec![
        ("any".to_owned(), port(&status.head.address)),
        ("loopback or one address".to_owned(), port(&status.head.http)),
        ("loopback or one address".to_owned(), port(&status.head.dashboard)),
    ];
    let mut found = listens(status.head.pid);
    expected.sort();
    found.sort();
    assert_eq!(found, expected, "the head");
    for pid in status.nodes.iter().map(|node| node.pid).chain(status.ranks.iter().map(|rank| rank.pid)) {
        assert_eq!(listens(pid), [], "agents listen never, ranks only while their group forms");
    }
    let ports: Vec<String> = documented().into_iter().map(|(port, _)| port).collect();
    assert_eq!(ports, ["8001", "8000", "8265", "any, or `--collective-ports`"], "docs/security.md");
    for rank in &status.ranks {
        check_rights(rank.pid);
    }
    for home in [cluster.node.home(), member.home()] {
        check_files(home);
    }
}

fn check_rights(pid: u32) {
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).expect("the rank is there");
    assert!(read("status").contains("NoNewPrivs:\t1"), "a rank gets no more rights");
    assert!(!read("environ").contains("PHALANX_TOKEN"), "a rank has no token");
    assert!(!read("cmdline").contains("phxt-"), "nor do its arguments");
}

/// Nothing below a home's folders is for others.
fn check_files(home: &Path) {
    let mut folders: Vec<PathBuf> =
        ["run", "store", "trust", "logs"].iter().map(|name| home.join(name)).filter(|path| path.is_dir()).collect();
    assert!(folders.len() >= 3, "{folders:?}");
    while let Some(folder) = folders.pop() {
        let mode = |path: &Path| fs::symlink_metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!(mode(&folder), 0o700, "{}", folder.display());
        for entry in fs::read_dir(&folder).expect("a folder").flatten() {
            let path = entry.path();
            assert_eq!(mode(&path) & 0o077, 0, "{}", path.display());
            if path.is_dir() {
                folders.push(path);
            }
        }
    }
}

/// `--insecure` is said wherever somebody looks.
#[test]
fn insecure_is_said_loudly() {
    let cluster = Cluster::start_with(1, &["--insecure"]);
    let status = cluster.node.run("coordinator", &["status"]);
    assert!(status.stdout.contains("INSECURE"), "{}", status.stdout);
    assert!(cluster.status().head.insecure && cluster.node.logs().contains("--insecure"));
    let member = Node::new();
    let joined = join(&member, &cluster, &["--insecure"]);
    assert!(joined.code == 0 && joined.stderr.contains("INSECURE"), "{joined:?}");
    let tls = Node::new();
    let token = open_to_machines(&[]).node.make_token(&[]);
    refused(&join(&tls, &cluster, &["--token", &token]), &["does not speak TLS", "--insecure"]);
    refused(&cluster.node.run("coordinator", &["token", "list"]), &["no tokens"]);
}
