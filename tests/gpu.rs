//! The whole system on NVIDIA devices: real processes, HTTP, one and two ranks.
//!
//! Not part of `cargo test`: it needs a device, and fails where there is none. `cargo xtask gpu-test` runs it. What needs two
//! devices says so where one is visible.

#![expect(clippy::expect_used, clippy::panic, reason = "helpers of tests are test code too")]

use std::process::Command;
use std::time::{Duration, Instant};

use harness::{
    Cluster, Golden, Precision, Processes, StreamEnd, check_agreement, check_edited, check_model, check_near,
    edited_answers, edited_requests, embedding_model, embedding_reference, golden, goldens, model_config, smollm2,
    smollm2_bf16, token_ids, vectors, wait_for,
};
use phalanx_kernels::cuda::{Context, devices};
use serde_json::{Value, json};

/// Longest wait of a rank for one that has died: the limit of a kernel that waits, and the end of the processes.
const SURVIVOR_DEADLINE: Duration = Duration::from_secs(20);
/// Device memory that other things on the machine may take or give back meanwhile.
const MEMORY_SLACK: u64 = 64 << 20;

fn num_devices() -> u32 {
    let found = devices().unwrap_or_else(|e| panic!("these tests need an NVIDIA device: {e}"));
    assert!(!found.is_empty(), "these tests need an NVIDIA device, and none is visible");
    found.len() as u32
}

/// Tensor-parallel sizes that the machine has devices for.
fn sizes() -> Vec<&'static str> {
    let num = num_devices();
    if num < 2 {
        println!("NOT RUN at size 2: one device is visible");
    }
    ["1", "2"].into_iter().take(num as usize).collect()
}

fn cluster() -> Cluster {
    Cluster::start_with(num_devices().min(2), &["--device", "cuda"])
}

/// Bytes in use on each device: as `nvidia-smi` tells, or as the driver does where that is not installed.
fn used_bytes() -> Vec<u64> {
    let query = ["--query-gpu=memory.used", "--format=csv,noheader,nounits"];
    let told = Command::new("nvidia-smi").args(query).output().ok().filter(|output| output.status.success());
    if let Some(output) = told {
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        return text.lines().filter_map(|line| line.trim().parse::<u64>().ok()).map(|mib| mib << 20).collect();
    }
    let used = |ordinal| {
        let memory = Context::open(ordinal).and_then(|context| context.memory()).expect("the device's memory");
        memory.total - memory.free
    };
    (0..num_devices()).map(used).collect()
}

/// Waits until no device holds more than before.
fn wait_freed(before: &[u64]) {
    wait_for("device memory to be free again", || {
        let now = used_bytes();
        now.iter().zip(before).all(|(now, before)| *now <= before + MEMORY_SLACK).then_some(())
    });
    println!("device memory: {before:?} before, {:?} after", used_bytes());
}

/// Tokens of requests that come one after the other.
fn answers(cluster: &Cluster, requests: &[Value]) -> Vec<Vec<u32>> {
    requests.iter().map(|request| token_ids(&cluster.http.ask("/v1/completions", request)["choices"][0])).collect()
}

fn remove(cluster: &Cluster, name: &str) {
    let removed = cluster.node.run("coordinator", &["undeploy", name]);
    assert_eq!(removed.code, 0, "{removed:?}");
}

#[test]
fn tiny_models_compute_what_transformers_computes_in_every_type() {
    let cluster = cluster();
    let types = [("float32", Precision::TINY), ("float16", Precision::FLOAT16), ("bfloat16", Precision::BFLOAT16)];
    for size in sizes() {
        for (dtype, precision) in types {
            for model in goldens().into_iter().filter(|model| model.splits_into(size)) {
                let started = Instant::now();
                let flags = ["--tensor-parallel-size", size, "--dtype", dtype, "--max-num-seqs", "16"];
                check_model(&cluster, &model, &flags, precision);
                println!("{} {dtype} TP {size}: as the reference ({:.1?})", model.name, started.elapsed());
            }
        }
    }
}

#[test]
fn embeddings_are_the_hidden_states_that_numpy_computes() {
    let cluster = cluster();
    for name in ["tiny-llama", "tiny-qwen2"] {
        for (pooling, size) in
            ["last", "mean"].into_iter().flat_map(|pooling| sizes().into_iter().map(move |s| (pooling, s)))
        {
            let folder = embedding_model(name, pooling);
            let (prompts, expected) = embedding_reference(name, pooling);
            // Steps are short, so that the longest prompt comes in chunks.
            let flags = ["--dtype", "float32", "--tensor-parallel-size", size, "--max-num-batched-tokens", "48"];
            let served = cluster.serve(
                folder.path(),
                "m",
                &[&flags[..], &["--max-model-len", "256", "--max-num-seqs", "16"]].concat(),
            );
            assert_eq!(served.code, 0, "{served:?}");
            let what = format!("{name} {pooling} TP {size}");
            check_near(&what, &vectors(&cluster, &json!({"model": "m", "input": prompts})), &expected);
            for (prompt, expected) in prompts.as_array().expect("prompts").iter().zip(&expected) {
                check_near(
                    &what,
                    &vectors(&cluster, &json!({"model": "m", "input": prompt})),
                    std::slice::from_ref(expected),
                );
            }
            println!("embeddings of {what}: as the reference");
            remove(&cluster, "m");
        }
    }
}

#[test]
fn smollm2_computes_what_transformers_computes() {
    let cluster = cluster();
    let (Some(quantised), Some(half)) = (smollm2(), smollm2_bf16()) else { return };
    for size in sizes() {
        let common = ["--tensor-parallel-size", size, "--max-num-seqs", "16", "--dtype"];
        for model in [&quantised, &half] {
            check_model(&cluster, model, &[&common[..], &["float32"]].concat(), Precision::SMOLLM2);
            for dtype in ["auto", "float16", "bfloat16"] {
                check_agreement(&cluster, model, &[&common[..], &[dtype]].concat());
            }
        }
    }
}

/// Greedy and seeded requests with every kind of sampler.
fn sampled_requests(model: &Golden) -> Vec<Value> {
    let kinds = [
        json!({"temperature": 0}),
        json!({"temperature": 1, "seed": 7}),
        json!({"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 11}),
        json!({"temperature": 1.3, "min_p": 0.02, "seed": 13}),
    ];
    let mut requests = Vec::new();
    for prompt in &model.prompts {
        for kind in &kinds {
            let mut request = kind.clone();
            request["model"] = "m".into();
            request["prompt"] = json!(prompt.ids);
            request["max_tokens"] = 40.into();
            request["ignore_eos"] = true.into();
            request["return_token_ids"] = true.into();
            requests.push(request);
        }
    }
    requests
}

#[test]
fn recorded_steps_give_the_tokens_of_eager_ones() {
    let cluster = cluster();
    let models = [Some(golden("tiny-llama")), Some(golden("tiny-qwen2")), smollm2()];
    for model in models.into_iter().flatten() {
        let requests = sampled_requests(&model);
        for size in sizes() {
            for dtype in ["float32", "bfloat16"] {
                let flags = ["--tensor-parallel-size", size, "--dtype", dtype, "--max-num-seqs", "8"];
                cluster.serve(&model.folder, "m", &flags);
                let recorded = answers(&cluster, &requests);
                remove(&cluster, "m");
                cluster.serve(&model.folder, "m", &[&flags[..], &["--enforce-eager"]].concat());
                let eager = answers(&cluster, &requests);
                remove(&cluster, "m");
                assert_eq!(recorded, eager, "{} {dtype} TP {size}", model.name);
                println!("{} {dtype} TP {size}: {} answers are equal", model.name, requests.len());
            }
        }
    }
}

/// Penalties, biases, bans, a least length and grammars on devices: the answers of the CPU, recorded and eager, alone and with
/// others that have none, at every size.
#[test]
fn edited_requests_get_the_tokens_of_the_cpu() {
    let requests = edited_requests();
    let folder = golden("tiny-llama").folder;
    let common = ["--dtype", "float32", "--max-num-seqs", "32"];
    let on_cpu = Cluster::start_with(1, &["--device", "cpu"]);
    on_cpu.serve(&folder, "m", &common);
    let expected = edited_answers(&on_cpu.http, &requests, false);
    drop(on_cpu);
    let cluster = cluster();
    let plain = json!({"model": "m", "prompt": "Hi", "max_tokens": 200, "temperature": 0, "ignore_eos": true});
    for size in sizes() {
        for flag in [None, Some("--enforce-eager")] {
            let flags: Vec<&str> = common.into_iter().chain(["--tensor-parallel-size", size]).chain(flag).collect();
            cluster.serve(&folder, "m", &flags);
            let label = format!("TP {size} {}", flag.unwrap_or("recorded"));
            let alone = edited_answers(&cluster.http, &requests, false);
            check_edited(&label, &requests, &alone, &expected);
            let text = cluster.http.ask("/v1/completions", &plain)["choices"][0]["text"].clone();
            let mixed: Vec<Value> = requests.iter().cloned().chain(vec![plain.clone(); 4]).collect();
            let together = edited_answers(&cluster.http, &mixed, true);
            check_edited(&format!("{label}, together"), &requests, &together[..requests.len()], &expected);
            for other in &together[requests.len()..] {
                assert_eq!(other["text"], text, "{label}: beside edited ones a plain request gets its own text");
            }
            remove(&cluster, "m");
        }
    }
}

/// A small generator, so that a failing run can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// How far the two best tokens of one position are apart, by ln p.
fn margin(cluster: &Cluster, prompt: &[u64], answer: &[u32], step: usize) -> f64 {
    let ids: Vec<u64> = prompt.iter().copied().chain(answer[..=step].iter().map(|id| u64::from(*id))).collect();
    let body = json!({"model": "m", "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 2});
    let answer = cluster.http.ask("/v1/completions", &body);
    let entry = &answer["choices"][0]["prompt_logprobs"][prompt.len() + step];
    let mut best: Vec<f64> =
        entry.as_object().expect("an entry").values().filter_map(|token| token["logprob"].as_f64()).collect();
    best.sort_by(|a, b| b.total_cmp(a));
    best[0] - best[1]
}

/// Another batch means other shapes of products: a text may differ from what it is alone, from the first step on whose two
/// best tokens are as near as the type is exact.
#[test]
fn streams_in_company_differ_only_where_two_tokens_are_near() {
    let cluster = cluster();
    let mut random = Random(7);
    let prompts: Vec<Vec<u64>> =
        (0..32).map(|_| (0..1 + random.below(600)).map(|_| random.below(500)).collect()).collect();
    let types = [("float32", Precision::TINY), ("float16", Precision::FLOAT16), ("bfloat16", Precision::BFLOAT16)];
    for size in sizes() {
        for (dtype, precision) in types {
            let flags = ["--tensor-parallel-size", size, "--dtype", dtype, "--max-model-len", "1024"];
            cluster.serve(&golden("tiny-llama").folder, "m", &flags);
            let request = |prompt: &Vec<u64>| {
                json!({"model": "m", "prompt": prompt, "max_tokens": 48, "temperature": 0, "ignore_eos": true,
                       "return_token_ids": true})
            };
            let streams: Vec<_> = prompts
                .iter()
                .map(|prompt| {
                    let (http, request) = (cluster.http.clone(), request(prompt));
                    std::thread::spawn(move || {
                        let mut stream = http.stream("/v1/completions", &request);
                        assert_eq!(stream.finish(), StreamEnd::Done);
                        stream.token_ids
                    })
                })
                .collect();
            let together: Vec<Vec<u32>> = streams.into_iter().map(|s| s.join().expect("a stream")).collect();
            let alone = answers(&cluster, &prompts.iter().map(request).collect::<Vec<_>>());
            let mut num_different = 0;
            for (prompt, (together, alone)) in prompts.iter().zip(together.iter().zip(&alone)) {
                assert_eq!(together.len(), alone.len());
                let Some(step) = together.iter().zip(alone).position(|(a, b)| a != b) else { continue };
                num_different += 1;
                let margin = margin(&cluster, prompt, alone, step);
                assert!(margin <= precision.margin, "{dtype} TP {size}: step {step} differs at a margin of {margin}");
            }
            println!("{dtype} TP {size}: {num_different} of 32 texts differ from what they are alone");
            remove(&cluster, "m");
        }
    }
}

/// `kill -9` of a rank in the middle of a decode: nothing hangs, nothing stays, no memory is lost.
#[test]
fn a_killed_rank_leaves_no_process_and_no_memory() {
    for size in sizes() {
        let before = used_bytes();
        let cluster = cluster();
        cluster.serve(&golden("tiny-llama").folder, "m", &["--tensor-parallel-size", size, "--dtype", "float32"]);
        println!("TP {size}:");
        kill_a_rank(&cluster);
        end_all(&cluster);
        wait_freed(&before);
    }
}

/// Kills the last rank while it decodes, and looks at what becomes of the stream and of the others.
fn kill_a_rank(cluster: &Cluster) {
    let ranks = cluster.ranks("m");
    let prompt = &golden("tiny-llama").prompts[1];
    let body = json!({"model": "m", "prompt": prompt.ids, "max_tokens": 900, "temperature": 0, "ignore_eos": true});
    let mut stream = cluster.http.stream("/v1/completions", &body);
    stream.step().expect("a first event");
    let victim = ranks.last().expect("a rank").pid;
    let killed = Instant::now();
    Processes::kill(victim);
    let end = stream.finish();
    println!("the stream ended {:.1?} after the kill: {end:?}", killed.elapsed());
    assert!(killed.elapsed() < SURVIVOR_DEADLINE, "it took {:?}", killed.elapsed());
    assert_ne!(end, StreamEnd::Cut);
    // Either the group came up again and the answer went on, or the client was told.
    let survivors: Vec<u32> = ranks.iter().map(|rank| rank.pid).filter(|pid| *pid != victim).collect();
    check_survivors(cluster, &survivors, killed);
}

/// Ends a cluster; all processes are gone after it.
fn end_all(cluster: &Cluster) {
    let status = cluster.status();
    let ranks = status.ranks.iter().map(|rank| rank.pid);
    let all: Vec<u32> = ranks.chain(status.nodes.iter().map(|node| node.pid)).collect();
    let stopped = cluster.node.run("coordinator", &["stop"]);
    assert_eq!(stopped.code, 0, "{stopped:?}");
    Processes::wait_gone(&all);
}

/// The ranks that were not killed have ended, or are part of the group that came up again.
fn check_survivors(cluster: &Cluster, survivors: &[u32], killed: Instant) {
    wait_for("the group to be ready again", || (cluster.deployment_state("m") == "ready").then_some(()));
    let now: Vec<u32> = cluster.ranks("m").iter().map(|rank| rank.pid).collect();
    for pid in survivors.iter().filter(|pid| !now.contains(pid)) {
        wait_for("the other rank to end", || (!Processes::alive(*pid)).then_some(()));
    }
    println!("ready again {:.1?} after the kill", killed.elapsed());
    let prompt = &golden("tiny-llama").prompts[1];
    let body = json!({"model": "m", "prompt": prompt.ids, "max_tokens": 8, "temperature": 0, "ignore_eos": true,
                      "return_token_ids": true});
    assert_eq!(answers(cluster, &[body])[0], prompt.greedy[..8]);
}

/// What cannot fit is refused with the arithmetic; what was tried leaves no memory behind, and the next model is served.
#[test]
fn what_does_not_fit_is_refused_with_the_arithmetic() {
    let before = used_bytes();
    let cluster = cluster();
    let config = model_config("qwen1.5-0.5b");
    let config = config.to_str().expect("a path");
    let flags = ["serve", config, "--load-format", "dummy", "--dtype", "bfloat16", "--max-model-len", "32768"];
    let share = ["--gpu-memory-utilization", "0.012"];
    let refused = cluster.node.run("coordinator", &[&flags[..], &share].concat());
    assert_ne!(refused.code, 0, "{refused:?}");
    println!("refused: {}", refused.stderr.trim());
    assert!(refused.stderr.contains("--gpu-memory-utilization"), "says what to do: {}", refused.stderr);
    assert!(refused.stderr.chars().any(|c| c.is_ascii_digit()), "has figures: {}", refused.stderr);
    let prompt = &golden("tiny-qwen2").prompts[1];
    cluster.serve(&golden("tiny-qwen2").folder, "m", &["--dtype", "float32"]);
    let body = json!({"model": "m", "prompt": prompt.ids, "max_tokens": 8, "temperature": 0, "ignore_eos": true,
                      "return_token_ids": true});
    assert_eq!(answers(&cluster, &[body])[0], prompt.greedy[..8]);
    drop(cluster);
    wait_freed(&before);
}
