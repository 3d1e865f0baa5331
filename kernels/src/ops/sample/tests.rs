//! Sampling against reference distributions, whole and in parts.

use super::super::edit::{LogitEdits, TokenHistory};
use super::*;

/// A file of the reference data.
fn golden(name: &str) -> serde_json::Value {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(name);
    let text = std::fs::read_to_string(path).expect("reference data is readable");
    serde_json::from_str(&text).expect("reference data is JSON")
}

/// `logits` in `num` parts of nearly the same size, with their first ids.
fn split(logits: &[f32], num: usize) -> Vec<(u32, &[f32])> {
    let len = logits.len().div_ceil(num);
    (0..num)
        .map(|i| ((i * len) as u32, &logits[(i * len).min(logits.len())..((i + 1) * len).min(logits.len())]))
        .collect()
}

/// The floor of a cut over `num` ranks, through the bytes that would be sent.
fn cut(logits: &[f32], params: CutParams, num: usize) -> Cut {
    let parts = split(logits, num);
    let all = MaxSum::merge(parts.iter().map(|p| MaxSum::from_bytes(&MaxSum::of(p.1).to_bytes())));
    let mut cut = Cut::new(params, all.max);
    let (mut part, mut bytes) = (Histogram::default(), vec![0; Histogram::BYTES]);
    for pass in (0..Cut::NUM_PASSES).filter(|&p| Cut::new(params, 0.0).takes_part(p)) {
        let mut merged = Histogram::default();
        for (_, logits) in &parts {
            cut.histogram(pass, logits, &mut part);
            part.write_to(&mut bytes);
            merged.add_bytes(&bytes);
        }
        cut.apply(pass, &merged);
    }
    cut
}

fn probabilities(logits: &[f32], cut: &Cut) -> Vec<f64> {
    let masses: Vec<f64> = logits.iter().map(|&x| if cut.keeps(x) { cut.mass(x) } else { 0.0 }).collect();
    let sum: f64 = masses.iter().sum();
    masses.iter().map(|m| m / sum).collect()
}

fn winner(logits: &[f32], num: usize, temperature: f32, floor: u32, key: &RandomKey) -> u32 {
    let parts = split(logits, num);
    let drawn = parts.iter().map(|(first, part)| draw(part, *first, temperature, floor, key));
    Candidate::merge(drawn.map(|c| Candidate::from_bytes(&Candidate::to_bytes(c)))).expect("a winner").id
}

fn logits_of(record: &serde_json::Value) -> Vec<f32> {
    record["logits"].as_array().expect("logits").iter().map(|v| v.as_f64().expect("number") as f32).collect()
}

fn number(params: &serde_json::Value, name: &str, default: f64) -> f32 {
    params.get(name).map_or(default, |v| v.as_f64().expect("number")) as f32
}

fn ids(list: &serde_json::Value) -> Vec<u32> {
    list.as_array().into_iter().flatten().map(|id| id.as_u64().expect("an id") as u32).collect()
}

/// The logits of a record as the edits of a case leave them, in `num` parts.
fn edited(record: &serde_json::Value, params: &serde_json::Value, eos: u32, num: usize) -> Vec<f32> {
    let bias = params["logit_bias"].as_object().into_iter().flatten();
    let allowed = params["allowed_token_ids"].is_array().then(|| {
        let mut words = vec![0; 17];
        ids(&params["allowed_token_ids"]).iter().for_each(|id| words[*id as usize / 32] |= 1 << (id % 32));
        words
    });
    let edits = LogitEdits {
        presence_penalty: number(params, "presence_penalty", 0.0),
        frequency_penalty: number(params, "frequency_penalty", 0.0),
        repetition_penalty: number(params, "repetition_penalty", 1.0),
        bias: bias.map(|(id, bias)| (id.parse().expect("an id"), bias.as_f64().expect("a number") as f32)).collect(),
        allowed,
        bad_words: params["bad_words_token_ids"].as_array().into_iter().flatten().map(ids).collect(),
        min_tokens: number(params, "min_tokens", 0.0) as u32,
        end_tokens: [vec![eos], ids(&params["stop_token_ids"])].concat(),
    };
    let history = TokenHistory::new(&ids(&record["prompt_ids"]), &ids(&record["output_ids"]));
    let mut logits = logits_of(record);
    let len = logits.len().div_ceil(num);
    for (part, slice) in logits.chunks_mut(len).enumerate() {
        edits.apply(&history, slice, (part * len) as u32);
    }
    logits
}

fn cut_params(params: &serde_json::Value) -> CutParams {
    CutParams {
        temperature: number(params, "temperature", 1.0),
        top_k: number(params, "top_k", 0.0) as u32,
        top_p: number(params, "top_p", 1.0),
        min_p: number(params, "min_p", 0.0),
    }
}

/// The reference probabilities of a case, by token.
fn expected(case: &serde_json::Value, vocab_size: usize) -> Vec<f64> {
    match case["probs"].as_array() {
        Some(all) => all.iter().map(|v| v.as_f64().expect("number")).collect(),
        None => (0..vocab_size).map(|i| case["sparse"][i.to_string()].as_f64().unwrap_or(0.0)).collect(),
    }
}

#[test]
fn edits_and_cuts_have_the_reference_distributions_in_1_2_and_3_parts() {
    let reference = golden("decoding/sampling-tiny-llama.json");
    let eos = reference["eos_token_id"].as_u64().expect("an id") as u32;
    let mut num_checked = 0;
    for record in reference["records"].as_array().expect("records") {
        for case in record["cases"].as_array().expect("cases") {
            let p = &case["params"];
            for num in 1..=3 {
                let logits = edited(record, p, eos, num);
                let expected = expected(case, logits.len());
                let params = cut_params(p);
                check(&logits, params, num, &expected);
            }
            num_checked += 1;
        }
    }
    assert_eq!(num_checked, 3 * 28);
}

fn check(logits: &[f32], params: CutParams, num: usize, expected: &[f64]) {
    if params.temperature == 0.0 {
        let best = Candidate::merge(split(logits, num).iter().map(|(first, part)| Candidate::best(part, *first)));
        assert_eq!(expected[best.expect("a best").id as usize], 1.0);
        return;
    }
    let got = probabilities(logits, &cut(logits, params, num));
    for (id, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert_eq!(*got > 0.0, *expected > 0.0, "{params:?}, {num} parts, token {id}");
        assert!((got - expected).abs() < 1e-5, "{params:?}, {num} parts, token {id}: {got} {expected}");
    }
}

#[test]
fn draws_follow_the_distribution_whatever_the_parts() {
    let record = &golden("decoding/sampling-tiny-llama.json")["records"][0];
    let logits = logits_of(record);
    let params = CutParams { temperature: 0.9, top_k: 12, top_p: 0.95, min_p: 0.0 };
    let cut = cut(&logits, params, 2);
    let expected = probabilities(&logits, &cut);
    let num_draws = 20_000;
    let mut counts = vec![0u32; logits.len()];
    for output_index in 0..num_draws {
        let key = RandomKey { seed: 42, output_index };
        let id = winner(&logits, 1, params.temperature, cut.floor(), &key);
        assert_eq!(id, winner(&logits, 3, params.temperature, cut.floor(), &key));
        counts[id as usize] += 1;
    }
    let kept = expected.iter().filter(|&&p| p > 0.0).count();
    let chi: f64 = (counts.iter().zip(&expected))
        .filter(|(_, p)| **p > 0.0)
        .map(|(&n, p)| (f64::from(n) - p * f64::from(num_draws)).powi(2) / (p * f64::from(num_draws)))
        .sum();
    assert!(kept > 4 && chi < 3.0 * kept as f64, "chi-square {chi} over {kept} tokens");
    assert!(counts.iter().zip(&expected).all(|(&n, &p)| n == 0 || p > 0.0));
}

/// How far a chi-square of `degrees` is above its mean, in standard deviations (Wilson and Hilferty, 1931).
fn chi_square_z(chi: f64, degrees: f64) -> f64 {
    let spread = 2.0 / (9.0 * degrees);
    ((chi / degrees).cbrt() - (1.0 - spread)) / spread.sqrt()
}

/// Draws of as many seeds against probabilities; tokens that are rarely due share one class.
fn check_draws(label: &str, expected: &[f64], counts: &[u32], num_draws: u32) {
    let (mut chi, mut classes) = (0.0, 0_u32);
    let (mut rare_due, mut rare_count) = (0.0, 0.0);
    let mut class = |due: f64, count: f64| {
        chi += (count - due).powi(2) / due;
        classes += 1;
    };
    for (id, (p, count)) in expected.iter().zip(counts).enumerate() {
        let (due, count) = (p * f64::from(num_draws), f64::from(*count));
        assert!(due > 0.0 || count == 0.0, "{label}: token {id} is drawn {count} times and never due");
        if due >= 5.0 {
            class(due, count);
        } else {
            (rare_due, rare_count) = (rare_due + due, rare_count + count);
        }
    }
    if rare_due > 0.0 {
        class(rare_due, rare_count);
    }
    let z = if classes > 1 { chi_square_z(chi, f64::from(classes - 1)) } else { 0.0 };
    assert!(z < 4.0, "{label}: chi-square {chi:.1} over {classes} classes, z {z:.2}");
}

#[test]
fn draws_of_every_seed_follow_the_reference_distributions() {
    const NUM_DRAWS: u32 = 4_000;
    let reference = golden("decoding/sampling-tiny-llama.json");
    let eos = reference["eos_token_id"].as_u64().expect("an id") as u32;
    let mut num_checked = 0;
    for (place, record) in reference["records"].as_array().expect("records").iter().enumerate() {
        for case in record["cases"].as_array().expect("cases") {
            let p = &case["params"];
            let params = cut_params(p);
            if params.temperature == 0.0 {
                continue;
            }
            let logits = edited(record, p, eos, 2);
            let floor = cut(&logits, params, 2).floor();
            let expected = expected(case, logits.len());
            let mut counts = vec![0u32; logits.len()];
            for seed in 0..u64::from(NUM_DRAWS) {
                let key = RandomKey { seed, output_index: place as u32 };
                counts[winner(&logits, 2, params.temperature, floor, &key) as usize] += 1;
            }
            check_draws(&format!("record {place}, {p}"), &expected, &counts, NUM_DRAWS);
            num_checked += 1;
        }
    }
    assert!(num_checked >= 3 * 26, "{num_checked}");
}

#[test]
fn log_sum_exp_and_ranks_are_those_of_the_whole_row() {
    let logits: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 1000) as f32 * 0.01 - 3.0).collect();
    let exact = logits.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
    for num in 1..=4 {
        let parts = split(&logits, num);
        let all = MaxSum::merge(parts.iter().map(|p| MaxSum::of(p.1)));
        assert!((all.log_sum_exp() - exact).abs() < 1e-6);
        let lists = parts.iter().flat_map(|(first, part)| top_n(part, *first, 20));
        let top = merge_top_n(lists, 20);
        assert_eq!(top, top_n(&logits, 0, 20));
        let rank = 1 + parts.iter().map(|p| num_above(p.1, top[7].value as f32)).sum::<u32>();
        assert_eq!(rank, 8);
    }
}

#[test]
fn ties_go_to_the_lower_id_and_padding_never_wins() {
    let none = f32::NEG_INFINITY;
    assert_eq!(Candidate::best(&[none, none], 8), None);
    assert_eq!(Candidate::best(&[1.0, 3.0, 3.0], 5).map(|c| c.id), Some(6));
    let tied = [Candidate::best(&[3.0], 9), None, Candidate::best(&[3.0], 4)];
    assert_eq!(Candidate::merge(tied.into_iter()).map(|c| c.id), Some(4));
    assert_eq!(top_n(&[2.0, none, 2.0, 5.0], 0, 3).iter().map(|c| c.id).collect::<Vec<_>>(), [3, 0, 2]);
    let params = CutParams { temperature: 1.0, top_k: 2, top_p: 1.0, min_p: 0.0 };
    let tied = [0.0, -0.0, 1.0, none];
    assert_eq!(tied.map(|x| cut(&tied, params, 2).keeps(x)), [true, true, true, false]);
    let empty = MaxSum::merge([MaxSum::of(&[]), MaxSum::of(&[none])].into_iter());
    assert_eq!(empty, MaxSum { max: none, sum: 0.0 });
}

#[test]
fn keys_keep_the_order_of_logits() {
    let ordered = [f32::NEG_INFINITY, f32::MIN, -1.5, -1e-40, 0.0, 1e-40, 1.0, 1.0f32.next_up(), f32::INFINITY];
    assert!(ordered.windows(2).all(|w| logit_key(w[0]) < logit_key(w[1])));
    assert_eq!(logit_key(-0.0), logit_key(0.0));
}

/// The draw, token by token.
fn plain_draw(logits: &[f32], first_id: u32, temperature: f32, key: &RandomKey) -> Option<Candidate> {
    let value = |(id, &x): (u32, &f32)| Candidate {
        value: f64::from(x) / f64::from(temperature) + gumbel(random_word(key, id)),
        id,
    };
    let all = (first_id..).zip(logits).filter(|(_, x)| **x > f32::NEG_INFINITY).map(value);
    all.min_by(Candidate::better_first)
}

#[test]
fn a_draw_skips_no_winner() {
    let mut state = 1u32;
    let mut random = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32
    };
    for output_index in 0..300 {
        let (spread, temperature) = (30.0 * random(), 0.001f32.powf(random()) * 2.0);
        let mut logits: Vec<f32> = (0..1 + output_index as usize * 3).map(|_| spread * random() - 20.0).collect();
        logits[0] = f32::NEG_INFINITY;
        let key = RandomKey { seed: 7 << 33, output_index };
        let first_id = output_index * 37;
        let expected = plain_draw(&logits, first_id, temperature, &key);
        assert_eq!(draw(&logits, first_id, temperature, 0, &key), expected, "{spread} {temperature}");
    }
}

#[test]
fn philox_gives_the_published_vectors() {
    assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    assert_eq!(philox([!0; 4], [!0; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
    assert_eq!(philox(pi, [0xa409_3822, 0x299f_31d0]), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
}
