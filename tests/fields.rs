//! Fields of requests that only a whole server shows to work: each is asked for over HTTP and answered by real ranks.

#![expect(clippy::expect_used, reason = "helpers of tests are test code too")]

use std::fs;

use harness::{Cluster, golden};
use serde_json::{Value, json};
use tempfile::TempDir;

const PATH: &str = "/v1/completions";

fn body(rest: &Value) -> Value {
    let mut body = json!({"model": "m", "prompt": [5, 6, 7, 8, 9], "temperature": 0, "max_tokens": 6, "ignore_eos": true,
        "return_token_ids": true});
    for (name, value) in rest.as_object().expect("an object") {
        body[name.as_str()] = value.clone();
    }
    body
}

fn ask(cluster: &Cluster, rest: &Value) -> Value {
    cluster.http.ask(PATH, &body(rest))
}

/// The field that a request is refused for.
fn refused(cluster: &Cluster, rest: &Value) -> String {
    let answer = cluster.http.post(PATH, &body(rest));
    assert_eq!(answer.status, 400, "{rest}: {}", answer.body);
    answer.body["error"]["param"].as_str().expect("a field").to_owned()
}

fn near(a: &Value, b: &Value) -> bool {
    a.as_f64().zip(b.as_f64()).is_some_and(|(a, b)| (a - b).abs() < 1e-4)
}

/// Scores of named tokens are those that the same tokens have among the best, edits or not.
fn check_named_tokens(cluster: &Cluster) {
    for rest in [json!({}), json!({"allowed_token_ids": [40, 41, 42], "frequency_penalty": 1.5})] {
        let with = |field: Value| {
            let mut all = rest.clone();
            all.as_object_mut().expect("an object").extend(field.as_object().expect("an object").clone());
            all["return_tokens_as_token_ids"] = json!(true);
            ask(cluster, &all)["choices"][0].clone()
        };
        let best = with(json!({"logprobs": 20}));
        let tops = best["logprobs"]["top_logprobs"].as_array().expect("alternatives");
        let ids: Vec<u32> = tops
            .iter()
            .flat_map(|top| top.as_object().expect("an object").keys())
            .filter_map(|name| name.strip_prefix("token_id:")?.parse().ok())
            .take(100)
            .chain([300])
            .collect();
        let named = with(json!({"logprob_token_ids": ids}));
        assert_eq!(named["token_ids"], best["token_ids"]);
        let mut num_seen = 0;
        for (at, (named, best)) in
            named["logprobs"]["top_logprobs"].as_array().expect("scores").iter().zip(tops).enumerate()
        {
            for id in &ids {
                let name = format!("token_id:{id}");
                assert!(named[&name].is_number(), "{name} at {at}");
                if best[&name].is_number() {
                    assert!(near(&named[&name], &best[&name]), "{name} at {at}: {named} {best}");
                    num_seen += 1;
                }
            }
        }
        assert!(num_seen >= 40, "{num_seen}");
    }
    assert_eq!(refused(cluster, &json!({"logprob_token_ids": [100_000]})), "logprob_token_ids");
    assert_eq!(refused(cluster, &json!({"logprob_token_ids": vec![1; 129]})), "logprob_token_ids");
    assert_eq!(refused(cluster, &json!({"logprobs": -1})), "logprobs");
    assert_eq!(refused(cluster, &json!({"prompt_logprobs": -1})), "prompt_logprobs");
}

/// Named tokens of a prompt stand in their places, and the prompt's own have the scores that `prompt_logprobs` tells.
fn check_named_prompt_tokens(cluster: &Cluster) {
    let choice = |rest: Value| ask(cluster, &rest)["choices"][0].clone();
    let own = choice(json!({"prompt_logprobs": 0}))["prompt_logprobs"].clone();
    let rows = choice(json!({"prompt_logprob_token_ids": [[8, -1, 8], [9]], "prompt_logprob_start": 2}));
    let scores = &rows["prompt_token_id_logprobs"];
    assert!(
        near(&scores[0][0], &own[3]["8"]["logprob"]) && near(&scores[1][0], &own[4]["9"]["logprob"]),
        "{scores} {own}"
    );
    assert_eq!((&scores[0][1], &scores[0][0]), (&Value::Null, &scores[0][2]));
    let same = choice(json!({"prompt_logprob_token_ids": [6, 7, 8, 9], "prompt_logprobs": 2}));
    for (at, token) in (0..4).zip(6..10) {
        let found = &same["prompt_token_id_logprobs"][at][at];
        assert!(near(found, &own[at + 1][token.to_string()]["logprob"]), "{at}: {same} {own}");
    }
    assert!(same["prompt_logprobs"][1].as_object().expect("alternatives").len() <= 3);
    let wrong = json!({"prompt_logprob_token_ids": [[1]], "prompt_logprob_start": 0});
    assert_eq!(refused(cluster, &wrong), "prompt_logprob_token_ids");
    assert_eq!(refused(cluster, &json!({"prompt_logprob_token_ids": [1], "stream": true})), "prompt_logprob_token_ids");
}

fn check_salts(cluster: &Cluster) {
    let prompt: Vec<u32> = (0..64).map(|at| 200 + at).collect();
    let cached = |salt: Option<&str>| {
        let answer = ask(cluster, &json!({"prompt": prompt, "cache_salt": salt}));
        (answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64(), answer["choices"][0]["token_ids"].clone())
    };
    let (none, tokens) = cached(None);
    assert_eq!(none, Some(0));
    for (salt, expected) in [(None, 48), (Some("a"), 0), (Some("b"), 0), (Some("a"), 48), (None, 48)] {
        assert_eq!(cached(salt), (Some(expected), tokens.clone()), "{salt:?}");
    }
    assert_eq!(refused(cluster, &json!({"cache_salt": "a/b"})), "cache_salt");
}

fn check_cuts(cluster: &Cluster) {
    let prompt = |rest: Value| ask(cluster, &rest)["choices"][0]["prompt_token_ids"].clone();
    assert_eq!(prompt(json!({"truncate_prompt_tokens": 2})), json!([8, 9]));
    assert_eq!(prompt(json!({"truncate_prompt_tokens": 2, "truncation_side": "right"})), json!([5, 6]));
    let long: Vec<u32> = (0..200).collect();
    let cut = prompt(json!({"prompt": long, "truncate_prompt_tokens": -1}));
    assert_eq!(cut.as_array().map(Vec::len), Some(128 - 6));
    assert_eq!(refused(cluster, &json!({"truncate_prompt_tokens": 123})), "truncate_prompt_tokens");
    let chat = json!({"model": "m", "messages": [{"role": "user", "content": "word ".repeat(200)}], "max_tokens": 8,
        "truncate_prompt_tokens": -1});
    assert_eq!(cluster.http.ask("/v1/chat/completions", &chat)["usage"]["prompt_tokens"], 120);
}

fn check_pieces(cluster: &Cluster) {
    let sizes = |interval: u32| {
        let rest = json!({"stream": true, "stream_interval": interval, "max_tokens": 10});
        let mut stream = cluster.http.stream(PATH, &body(&rest));
        let frames = std::iter::from_fn(|| stream.step().ok());
        let ids = |frame: Value| frame["choices"][0]["token_ids"].as_array().map_or(0, Vec::len);
        frames.map(ids).filter(|num| *num > 0).collect::<Vec<_>>()
    };
    assert_eq!(sizes(4), [1, 4, 4, 1]);
    assert_eq!(sizes(100), [1, 9]);
    assert_eq!(sizes(1).iter().sum::<usize>(), 10);
}

fn check_ids_alone(cluster: &Cluster) {
    let whole = ask(cluster, &json!({}))["choices"][0].clone();
    let alone = ask(cluster, &json!({"detokenize": false, "return_token_ids": false}))["choices"][0].clone();
    assert_eq!((&alone["text"], &alone["token_ids"]), (&json!(""), &whole["token_ids"]));
    assert_ne!(whole["text"], "");
    assert_eq!(refused(cluster, &json!({"detokenize": false, "stop": "x"})), "stop");
}

fn check_loops(cluster: &Cluster) {
    let rest = json!({"allowed_token_ids": [40], "max_tokens": 50,
        "repetition_detection": {"max_pattern_size": 3, "min_count": 4}});
    let choice = ask(cluster, &rest)["choices"][0].clone();
    assert_eq!((&choice["finish_reason"], &choice["token_ids"]), (&json!("repetition"), &json!([40, 40, 40, 40])));
    let mut later = rest;
    later["min_tokens"] = json!(7);
    assert_eq!(ask(cluster, &later)["usage"]["completion_tokens"], 7);
    assert_eq!(
        refused(cluster, &json!({"repetition_detection": {"max_pattern_size": 2}})),
        "repetition_detection.min_count"
    );
}

/// However many outputs or steps a request has, its prompt counts once.
fn check_prompt_counts(cluster: &Cluster) {
    let counted = |name: &str| {
        let (_, text) = cluster.http.get("/metrics");
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
        line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok()).unwrap_or(0.0)
    };
    for rest in [json!({"use_beam_search": true, "n": 3}), json!({"n": 3, "temperature": 1})] {
        let names = ["phalanx_prompt_tokens_total", "vllm:prompt_tokens_total", "phalanx_request_prompt_tokens_sum"];
        let before = names.map(counted);
        assert_eq!(ask(cluster, &rest)["usage"]["prompt_tokens"], 5);
        for (name, before) in names.iter().zip(before) {
            assert!((counted(name) - before - 5.0).abs() < 1e-6, "{name}: {rest}");
        }
    }
    let before = counted("phalanx_prefix_cache_queries_total");
    ask(cluster, &json!({"use_beam_search": true, "n": 3}));
    assert!((counted("phalanx_prefix_cache_queries_total") - before - 5.0).abs() < 1e-6, "a search asks once");
}

/// The tokens that open and close thoughts in a copy of the tiny model.
const MARKS: [(u32, &str); 2] = [(512, "<think>"), (513, "</think>")];

/// A copy of the tiny model that opens thoughts in its template, and has tokens for both marks.
fn thinking_model() -> TempDir {
    let folder = TempDir::new().expect("a folder");
    for entry in fs::read_dir(golden("tiny-llama").folder).expect("a model").flatten() {
        fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("a copy");
    }
    let edit = |file: &str, edit: &dyn Fn(&mut Value)| {
        let path = folder.path().join(file);
        let mut value = serde_json::from_slice(&fs::read(&path).expect("a file")).expect("JSON");
        edit(&mut value);
        fs::write(path, value.to_string()).expect("a file");
    };
    edit("tokenizer.json", &|tokenizer| {
        for (id, content) in MARKS {
            tokenizer["added_tokens"].as_array_mut().expect("tokens").push(json!({"id": id, "content": content,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": false}));
        }
    });
    edit("tokenizer_config.json", &|config| {
        let template = config["chat_template"].as_str().expect("a template").to_owned();
        config["chat_template"] = json!(template + "{{ '<think>\n' }}");
    });
    folder
}

/// Behind so many tokens of thoughts comes the one that closes them, however unlikely it is.
fn check_thoughts(cluster: &Cluster) {
    let ids = |budget: i64| {
        let chat = json!({"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "temperature": 0,
            "ignore_eos": true, "logit_bias": {"513": -100}, "thinking_token_budget": budget, "return_token_ids": true});
        let answer = cluster.http.ask("/v1/chat/completions", &chat);
        let ids = answer["choices"][0]["token_ids"].as_array().expect("ids").iter().map(|id| id == 513);
        (ids.collect::<Vec<bool>>(), answer["usage"]["completion_tokens_details"]["reasoning_tokens"].clone())
    };
    let closed_at = |place: usize| (0..8).map(|at| at == place).collect::<Vec<bool>>();
    assert_eq!(ids(-1), (vec![false; 8], json!(8)));
    assert_eq!(ids(0).0, closed_at(0));
    assert_eq!(ids(3).0, closed_at(3));
    let prompt = json!({"prompt": [5, 512, 7], "thinking_token_budget": 2});
    assert_eq!(ask(cluster, &prompt)["choices"][0]["token_ids"][2], 513);
}

#[test]
fn fields_do_what_they_say() {
    let cluster = Cluster::start(2);
    for size in ["1", "2"] {
        let flags = ["--dtype", "float32", "--max-model-len", "128", "--tensor-parallel-size", size];
        cluster.serve(&golden("tiny-llama").folder, "m", &flags);
        check_named_tokens(&cluster);
        check_named_prompt_tokens(&cluster);
        check_salts(&cluster);
        if size == "1" {
            check_cuts(&cluster);
            check_pieces(&cluster);
            check_ids_alone(&cluster);
            check_loops(&cluster);
            check_prompt_counts(&cluster);
            assert_eq!(refused(&cluster, &json!({"thinking_token_budget": 2})), "thinking_token_budget");
        }
        assert_eq!(cluster.node.run("coordinator", &["undeploy", "m"]).code, 0);
    }
    cluster.serve(thinking_model().path(), "m", &["--dtype", "float32", "--max-model-len", "128"]);
    check_thoughts(&cluster);
}
