//! What ranks take, put together again, is the whole tensor; what is not theirs is zero.

use std::cell::Cell;
use std::path::PathBuf;

use phalanx_formats::test_support::{byte_at, gguf_model, goldens, small_geometry};
use phalanx_formats::{Architecture, EMBEDDING, Geometry, ModelFiles, ShardPlan, Sharding, Split, StoredType};
use phalanx_kernels::HostMatrix;

use super::{Rows, ShardLoader};

const MODELS: [&str; 6] =
    ["tiny-qwen2", "tiny-llama", "tiny-llama3-rope", "tiny-qwen2-tied-sharded", "tiny-internlm2", "tiny-mistral"];

fn golden(name: &str) -> ModelFiles {
    ModelFiles::open(&goldens().join(name)).unwrap()
}

/// A small GGUF model; the file stays mapped after its folder is gone.
fn quantised(geometry: &Geometry, dtype: StoredType) -> ModelFiles {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("model.gguf");
    std::fs::write(&path, gguf_model(geometry, dtype).build()).unwrap();
    ModelFiles::open(&path).unwrap()
}

/// Four heads of 40: with blocks of 32 the third head, where the second of two ranks begins, begins inside a block.
fn awkward_geometry() -> Geometry {
    Geometry {
        hidden_size: 160,
        num_heads: 4,
        num_kv_heads: 4,
        head_dim: 40,
        intermediate_size: 224,
        ..small_geometry(Architecture::Llama)
    }
}

fn row_bytes(matrix: &HostMatrix) -> usize {
    matrix.dtype.row_bytes(matrix.cols).unwrap()
}

/// Local rows of a tensor, by what a rank holds of it.
fn local_rows(loader: &ShardLoader<'_>, sharding: Sharding, rows: usize) -> Vec<Rows> {
    match sharding {
        Sharding::QueryRows => loader.query_rows(),
        Sharding::KvRows => loader.kv_rows(),
        Sharding::InnerRows => loader.inner_rows(),
        Sharding::VocabRows => loader.vocab_rows(),
        Sharding::Whole | Sharding::AttentionCols | Sharding::InnerCols => vec![Rows::Take(0..rows)],
    }
}

fn split(plan: &ShardPlan, sharding: Sharding) -> Option<&Split> {
    match sharding {
        Sharding::AttentionCols => Some(&plan.attention),
        Sharding::InnerCols => Some(&plan.inner),
        _ => None,
    }
}

fn check_rows(files: &ModelFiles, name: &str, rows: &[Rows], taken: &HostMatrix) {
    let view = files.tensor(name).unwrap();
    let mut local = taken.data.chunks_exact(row_bytes(taken));
    for part in rows {
        match part {
            Rows::Take(range) => {
                range.clone().for_each(|row| assert_eq!(local.next().unwrap(), view.row(row), "{name}"))
            }
            Rows::Zero(count) => {
                (0..*count).for_each(|_| assert!(local.next().unwrap().iter().all(|byte| *byte == 0), "{name}"));
            }
        }
    }
    assert!(local.next().is_none());
}

/// Held blocks are copied to where the split says, all else is zero.
fn check_cols(files: &ModelFiles, name: &str, split: &Split, taken: &HostMatrix) {
    let view = files.tensor(name).unwrap();
    let (block, bytes) = (view.dtype.block_len(), view.dtype.block_bytes());
    assert_eq!((taken.rows, taken.cols, taken.dtype), (view.num_rows(), split.padded, view.dtype));
    for (row, local) in taken.data.chunks_exact(row_bytes(taken)).enumerate() {
        for (index, local) in local.chunks_exact(bytes).enumerate() {
            // Columns of this local block that are owned; global column = owned.start + local - lead.
            let owned = (index * block..(index + 1) * block)
                .filter(|column| (split.lead..split.lead + split.owned.len()).contains(column))
                .collect::<Vec<_>>();
            match owned.first() {
                None => assert!(local.iter().all(|byte| *byte == 0), "{name} row {row} block {index}"),
                Some(first) => {
                    let from = (split.owned.start + first - split.lead) / block * bytes;
                    assert_eq!(local, &view.row(row)[from..from + bytes], "{name} row {row} block {index}");
                    assert_eq!((split.owned.start + first - split.lead) % block, first % block);
                }
            }
        }
    }
}

fn check_model(files: &ModelFiles) {
    for world_size in [1, 2, 3, 4, 7] {
        for rank in 0..world_size {
            let plan = files.shard_plan(world_size, rank);
            let loader = ShardLoader::new(files, &plan);
            for spec in files.geometry().tensors() {
                if let Some(split) = split(&plan, spec.sharding) {
                    check_cols(files, &spec.name, split, &loader.cols(&spec.name, split).unwrap().load());
                } else {
                    let rows = local_rows(&loader, spec.sharding, spec.rows);
                    check_rows(files, &spec.name, &rows, &loader.rows(&spec.name, &rows).unwrap().load());
                }
            }
        }
    }
}

#[test]
fn float_models_are_split_and_padded() {
    MODELS.into_iter().for_each(|name| check_model(&golden(name)));
}

#[test]
fn quantised_models_keep_their_blocks_whole() {
    check_model(&quantised(&awkward_geometry(), StoredType::Q8_0));
    check_model(&quantised(&small_geometry(Architecture::Llama), StoredType::Q4_1));
    let wide = Geometry {
        hidden_size: 256,
        num_heads: 8,
        num_kv_heads: 2,
        head_dim: 64,
        intermediate_size: 768,
        ..small_geometry(Architecture::Qwen2)
    };
    check_model(&quantised(&wide, StoredType::Q4K));
}

#[test]
fn a_shared_block_is_held_by_both_ranks() {
    let files = quantised(&awkward_geometry(), StoredType::Q8_0);
    let name = "model.layers.0.self_attn.o_proj.weight";
    let (first, second) = (files.shard_plan(2, 0), files.shard_plan(2, 1));
    assert_eq!(second.attention, Split { owned: 80..160, lead: 16, padded: 128 });
    let left = ShardLoader::new(&files, &first).cols(name, &first.attention).unwrap().load();
    let right = ShardLoader::new(&files, &second).cols(name, &second.attention).unwrap().load();
    // Columns 64..96 are the third block of one and the first block of the other.
    let shared: Vec<u8> = (68..102).map(|at| byte_at(name, 0, at)).collect();
    assert_eq!((&left.data[68..102], &right.data[..34]), (&shared[..], &shared[..]));
}

/// A layer whose blocks are shorter than the plan's, as in files of mixed formats.
#[test]
fn shorter_blocks_fit_into_a_plan_for_longer_ones() {
    let files = quantised(&awkward_geometry(), StoredType::Q8_0);
    for rank in 0..2 {
        let plan = ShardPlan::new(files.geometry(), 2, rank, 256, 256);
        let loader = ShardLoader::new(&files, &plan);
        let name = "model.layers.1.self_attn.o_proj.weight";
        check_cols(&files, name, &plan.attention, &loader.cols(name, &plan.attention).unwrap().load());
    }
}

#[test]
fn vectors_are_floats() {
    let files = golden("tiny-qwen2");
    let plan = files.shard_plan(3, 0);
    let loader = ShardLoader::new(&files, &plan);
    let name = "model.layers.0.self_attn.q_proj.bias";
    let bias = loader.vector(name, &[Rows::Zero(2), Rows::Take(4..6)]).unwrap();
    let stored = |row: usize| {
        let bytes = files.tensor(name).unwrap().row(row);
        half::bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
    };
    assert_eq!(bias, [0.0, 0.0, stored(4), stored(5)]);
    assert_ne!(stored(4), 0.0);
}

#[test]
fn what_is_not_there_is_an_error() {
    let files = golden("tiny-qwen2");
    let plan = files.shard_plan(1, 0);
    let loader = ShardLoader::new(&files, &plan);
    let check = |message: String, words: &str| assert!(message.contains(words), "{message}");
    check(loader.rows("x", &[]).unwrap_err().to_string(), "tensor x: is not in the model's files");
    check(loader.rows(EMBEDDING, &[Rows::Take(500..521)]).unwrap_err().to_string(), "has 520 rows");
    check(loader.vector(EMBEDDING, &[Rows::Take(0..1)]).unwrap_err().to_string(), "should be a vector");
    let split = Split { owned: 0..65, lead: 0, padded: 128 };
    check(loader.cols(EMBEDDING, &split).unwrap_err().to_string(), "does not fit");
    let quantised = quantised(&awkward_geometry(), StoredType::Q8_0);
    let loader = ShardLoader::new(&quantised, &plan);
    // A plan that was made for floats.
    let split = Split { owned: 80..160, lead: 0, padded: 128 };
    let error = loader.cols("model.layers.0.self_attn.o_proj.weight", &split).unwrap_err();
    check(error.to_string(), "does not fit");
}

/// Loads all tensors as a rank does, and returns the matrices of one.
fn load_all(loader: &ShardLoader<'_>, files: &ModelFiles, plan: &ShardPlan) {
    for spec in files.geometry().tensors() {
        let rows = local_rows(loader, spec.sharding, spec.rows);
        match (spec.cols, split(plan, spec.sharding)) {
            (None, _) => drop(loader.vector(&spec.name, &rows).unwrap()),
            (Some(_), None) => drop(loader.rows(&spec.name, &rows).unwrap()),
            (Some(_), Some(split)) => drop(loader.cols(&spec.name, split).unwrap()),
        }
    }
}

#[test]
fn progress_ends_at_one() {
    let models = MODELS.map(golden).into_iter().chain([quantised(&awkward_geometry(), StoredType::Q8_0)]);
    for files in models {
        for world_size in [1, 3] {
            let plan = files.shard_plan(world_size, 0);
            let (calls, last) = (Cell::new(0), Cell::new(0.0f32));
            let loader = ShardLoader::new(&files, &plan).on_progress(|fraction| {
                assert!(fraction >= last.get());
                last.set(fraction);
                calls.set(calls.get() + 1);
            });
            load_all(&loader, &files, &plan);
            assert_eq!((calls.get(), last.get()), (files.geometry().tensors().len(), 1.0));
        }
    }
}

#[test]
fn made_up_models_are_the_same_for_every_world_size() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(goldens().join("tiny-qwen2/config.json"), folder.path().join("config.json")).unwrap();
    let files = ModelFiles::open_config(folder.path()).unwrap();
    assert!(files.tokenizer_source().is_none() && !files.has_tensor(EMBEDDING));
    let whole_plan = files.shard_plan(1, 0);
    let whole = ShardLoader::dummy(&files, &whole_plan, 7);
    load_all(&whole, &files, &whole_plan);
    let plan = files.shard_plan(2, 1);
    let part = ShardLoader::dummy(&files, &plan, 7);
    load_all(&part, &files, &plan);

    let name = "model.layers.1.mlp.down_proj.weight";
    let (full, half) =
        (whole.cols(name, &whole_plan.inner).unwrap().load(), part.cols(name, &plan.inner).unwrap().load());
    let owned = plan.inner.owned.clone();
    assert_eq!(full.data[owned.start * 2..owned.end * 2], half.data[..owned.len() * 2]);
    let rows = part.rows(EMBEDDING, &[Rows::Take(300..301)]).unwrap().load();
    assert_eq!(rows.data, whole.rows(EMBEDDING, &[Rows::Take(300..301)]).unwrap().load().data);
    assert_ne!(rows.data, whole.rows(EMBEDDING, &[Rows::Take(301..302)]).unwrap().load().data);

    let floats: Vec<f32> =
        full.data.as_chunks::<2>().0.iter().map(|pair| half::bf16::from_le_bytes(*pair).to_f32()).collect();
    let square = floats.iter().map(|value| value * value).sum::<f32>() / (64 * 176) as f32;
    assert!((0.015..0.025).contains(&square.sqrt()), "{square}");
    assert_eq!(whole.vector("model.norm.weight", &[Rows::Take(0..64)]).unwrap(), [1.0; 64]);
}
