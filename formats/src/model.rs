//! A model's files, opened: geometry at once, tensors when they are asked for.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::gguf::{self, GgufFile};
use crate::huggingface::{self, Folder};
use crate::mapping::Mapping;
use crate::row_order::RowOrder;
use crate::tensors::EMBEDDING;
use crate::texts::ModelTexts;
use crate::{
    EmbeddingSettings, GenerationDefaults, Geometry, ModelError, ShardPlan, Sharding, StoredType, TokenizerSource,
    weight_bytes,
};

/// What kind of files a model is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// A folder with `config.json` and safetensors files.
    HuggingFace,
    /// A GGUF file.
    Gguf,
}

/// Where a tensor lies, and how.
#[derive(Debug, Clone)]
pub(crate) struct TensorEntry {
    /// Its type, or the word for a type that is not known.
    pub dtype: Result<StoredType, String>,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Which of the model's files.
    pub file: usize,
    /// Bytes of that file, checked to be inside it.
    pub range: Range<usize>,
    /// How its rows lie.
    pub row_order: RowOrder,
}

/// A model's files: headers were read and checked, tensors are mapped and read where they are touched.
#[derive(Debug)]
pub struct ModelFiles {
    path: PathBuf,
    kind: FileKind,
    geometry: Geometry,
    main_dtype: StoredType,
    tensors: HashMap<String, TensorEntry>,
    files: Vec<Mapping>,
    texts: ModelTexts,
    gguf: Option<GgufFile>,
}

impl ModelFiles {
    /// Opens a folder in Hugging Face layout or a `.gguf` file (of a split one, its first part). Reads headers only.
    ///
    /// # Errors
    /// It is no model, a file is missing or damaged, or the model is of a kind that is not supported.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let mut model = Self::open_config(path)?;
        match &model.gguf {
            Some(gguf) => model.tensors = gguf.tensors(&mut model.files)?,
            None => {
                let found = huggingface::open_tensors(path, &model.geometry)?;
                (model.tensors, model.files) = (found.tensors, found.files);
            }
        }
        model.check_tensors()?;
        model.check_unused_biases()?;
        model.main_dtype = model.widest_dtype();
        Ok(model)
    }

    /// Opens only what describes the model, for weights that are made up: no tensors.
    ///
    /// # Errors
    /// It is no model, or of a kind that is not supported.
    pub fn open_config(path: &Path) -> Result<Self, ModelError> {
        let metadata = std::fs::metadata(path).map_err(|source| ModelError::Io { path: path.to_owned(), source })?;
        if metadata.is_dir() { Self::open_folder(path) } else { Self::open_gguf(path) }
    }

    fn open_folder(path: &Path) -> Result<Self, ModelError> {
        let Folder { geometry, declared_dtype, texts } = huggingface::open_folder(path)?;
        Ok(Self {
            path: path.to_owned(),
            kind: FileKind::HuggingFace,
            geometry,
            main_dtype: declared_dtype,
            tensors: HashMap::new(),
            files: Vec::new(),
            texts,
            gguf: None,
        })
    }

    fn open_gguf(path: &Path) -> Result<Self, ModelError> {
        let mapping = Mapping::open(path)?;
        if !gguf::is_gguf(mapping.bytes()) {
            let reason = "a model is a folder with config.json, or a GGUF file, and this file is not GGUF".to_owned();
            return Err(ModelError::NotAModel { path: path.to_owned(), reason });
        }
        let gguf = GgufFile::open(&mapping)?;
        Ok(Self {
            path: path.to_owned(),
            kind: FileKind::Gguf,
            geometry: gguf.geometry.clone(),
            main_dtype: StoredType::F16,
            tensors: HashMap::new(),
            files: vec![mapping],
            texts: gguf.texts.clone(),
            gguf: Some(gguf),
        })
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What kind of files it is made of.
    pub fn kind(&self) -> FileKind {
        self.kind
    }

    /// Its shape.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The type that most of its weights are stored in; without tensors, the one that its configuration declares.
    pub fn main_dtype(&self) -> StoredType {
        self.main_dtype
    }

    /// Whether there is a tensor of this Hugging Face name.
    pub fn has_tensor(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// A tensor by its Hugging Face name, whatever the kind of files.
    ///
    /// # Errors
    /// It is absent, or of a type that is not supported.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, ModelError> {
        let absent = || ModelError::tensor(&self.name_in_files(name), "is not in the model's files");
        let entry = self.tensors.get(name).ok_or_else(absent)?;
        let dtype = match &entry.dtype {
            Ok(dtype) => *dtype,
            Err(found) => {
                return Err(ModelError::tensor(name, format!("has the type {found}, which is not supported")));
            }
        };
        let file = self.files.get(entry.file);
        let data = file.and_then(|file| file.bytes().get(entry.range.clone()));
        let (Some(file), Some(data)) = (file, data) else {
            return Err(ModelError::tensor(name, "lies outside of its file"));
        };
        let (num_rows, cols) = matrix_shape(&entry.shape);
        let num_stored = entry.row_order.num_stored(num_rows);
        let Some(row_bytes) = dtype.row_bytes(cols).filter(|row| row.checked_mul(num_stored) == Some(data.len()))
        else {
            return Err(ModelError::tensor(name, format!("of shape {:?} cannot be stored as {dtype:?}", entry.shape)));
        };
        Ok(TensorView {
            dtype,
            shape: entry.shape.clone(),
            num_rows,
            cols,
            row_bytes,
            data,
            row_order: entry.row_order,
            file,
            start: entry.range.start,
        })
    }

    /// Ids that end a sequence, from all the places where model files name them.
    pub fn end_token_ids(&self) -> Vec<u32> {
        self.texts.end_token_ids.clone()
    }

    /// Sampling parameters that the model's authors recommend.
    pub fn generation_defaults(&self) -> GenerationDefaults {
        self.texts.defaults
    }

    /// How hidden states become embeddings.
    pub fn embedding_settings(&self) -> EmbeddingSettings {
        self.texts.embedding.clone()
    }

    /// Where the tokenizer is; `None` where the model has none and serves token ids only.
    pub fn tokenizer_source(&self) -> Option<TokenizerSource> {
        match (&self.gguf, self.files.first()) {
            (Some(gguf), Some(file)) => gguf.vocab(file).map(TokenizerSource::Gguf),
            _ => self.texts.tokenizer.clone(),
        }
    }

    /// Longest quantisation block along the columns of any layer's attention output projection: 1 for floats.
    pub fn attention_block(&self) -> usize {
        self.longest_block(Sharding::AttentionCols)
    }

    /// Longest quantisation block along the columns of any layer's down projection: 1 for floats.
    pub fn inner_block(&self) -> usize {
        self.longest_block(Sharding::InnerCols)
    }

    /// Bytes of one rank's weights as they are stored, padding included.
    pub fn weight_bytes(&self, plan: &ShardPlan) -> u64 {
        weight_bytes(&self.geometry, plan, |name| self.stored_type(name).unwrap_or(self.main_dtype))
    }

    /// The part of this model that one rank of a group holds.
    ///
    /// # Panics
    /// `rank` is not below `world_size`: the caller's mistake.
    pub fn shard_plan(&self, world_size: usize, rank: usize) -> ShardPlan {
        ShardPlan::new(&self.geometry, world_size, rank, self.attention_block(), self.inner_block())
    }

    /// What the model's files call a tensor, for messages.
    fn name_in_files(&self, name: &str) -> String {
        match self.kind {
            FileKind::HuggingFace => self.geometry.architecture.family().names.in_files(name),
            FileKind::Gguf => gguf::NAMES.in_files(name),
        }
    }

    fn stored_type(&self, name: &str) -> Option<StoredType> {
        self.tensors.get(name).and_then(|entry| entry.dtype.as_ref().ok().copied())
    }

    fn longest_block(&self, sharding: Sharding) -> usize {
        let specs = self.geometry.tensors().into_iter().filter(|spec| spec.sharding == sharding);
        specs.filter_map(|spec| self.stored_type(&spec.name)).map(StoredType::block_len).max().unwrap_or(1)
    }

    /// Each tensor that the architecture needs is there, in the right shape and in a type that can be read.
    fn check_tensors(&self) -> Result<(), ModelError> {
        for spec in self.geometry.tensors() {
            let view = self.tensor(&spec.name)?;
            if view.shape != spec.shape() {
                let reason = format!("has the shape {:?}, but the configuration says {:?}", view.shape, spec.shape());
                return Err(ModelError::tensor(&self.name_in_files(&spec.name), reason));
            }
        }
        Ok(())
    }

    /// A bias that the layers do not apply must be zero: some conversions write such ones.
    fn check_unused_biases(&self) -> Result<(), ModelError> {
        for layer in 0..self.geometry.num_layers {
            for part in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"] {
                if part != "self_attn.o_proj" && self.geometry.qkv_bias {
                    continue;
                }
                let name = format!("model.layers.{layer}.{part}.bias");
                if self.has_tensor(&name) && !self.tensor(&name)?.is_zero() {
                    return Err(ModelError::tensor(
                        &self.name_in_files(&name),
                        "is not zero; this architecture has no such bias here",
                    ));
                }
            }
        }
        Ok(())
    }

    /// The type of most values of the layers; the embedding has often another one.
    fn widest_dtype(&self) -> StoredType {
        let mut values: Vec<(StoredType, usize)> = Vec::new();
        for spec in self.geometry.tensors() {
            let Some(dtype) = self.stored_type(&spec.name).filter(|_| spec.cols.is_some() && spec.name != EMBEDDING)
            else {
                continue;
            };
            let size = spec.rows * spec.cols.unwrap_or(1);
            match values.iter_mut().find(|(known, _)| *known == dtype) {
                Some((_, sum)) => *sum += size,
                None => values.push((dtype, size)),
            }
        }
        values.into_iter().max_by_key(|(_, sum)| *sum).map_or(self.main_dtype, |(dtype, _)| dtype)
    }
}

/// Rows and columns; a vector has one column, so that its elements are rows.
fn matrix_shape(shape: &[usize]) -> (usize, usize) {
    match shape {
        [] => (1, 1),
        [rows] => (*rows, 1),
        [rows, cols @ ..] => (*rows, cols.iter().fold(1, |product, dim| product.saturating_mul(*dim))),
    }
}

/// A tensor in its file.
#[derive(Debug)]
pub struct TensorView<'a> {
    /// How it is stored.
    pub dtype: StoredType,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    num_rows: usize,
    cols: usize,
    row_bytes: usize,
    data: &'a [u8],
    row_order: RowOrder,
    file: &'a Mapping,
    start: usize,
}

impl<'a> TensorView<'a> {
    /// Rows; the elements of a vector are rows of one column.
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// Values in a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// Row `row` in Hugging Face order, as it is stored.
    ///
    /// # Panics
    /// There is no such row: the caller's mistake, as with a slice.
    pub fn row(&self, row: usize) -> &'a [u8] {
        assert!(row < self.num_rows, "row {row} of {}", self.num_rows);
        let start = self.row_order.stored(row) * self.row_bytes;
        &self.data[start..start + self.row_bytes]
    }

    /// All its bytes, in the order of the file.
    #[cfg(test)]
    pub(crate) fn stored_bytes(&self) -> &'a [u8] {
        self.data
    }

    /// Whether all its bytes are zero.
    fn is_zero(&self) -> bool {
        self.data.iter().all(|byte| *byte == 0)
    }

    /// Gives the memory of these rows back, of those that lie together; reading them again reads the file again.
    pub fn release(&self, rows: Range<usize>) {
        let end = rows.end.min(self.num_rows);
        if rows.start < end {
            let stored = self.row_order.span(rows.start..end);
            self.file.release(self.start + stored.start * self.row_bytes..self.start + stored.end * self.row_bytes);
        }
    }
}
