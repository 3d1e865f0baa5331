//! Model families: what each states about itself, a file each. Everything else about a decoder is the same for all of them.
//!
//! Owns the registry and the words in which families differ. Does not read files: `huggingface` and `gguf` do, by these words.
//!
//! **Invariant:** nothing outside of this crate asks for the family. What code needs to know is in [`Geometry`](crate::Geometry),
//! and tensors have the names of Hugging Face's Llama.

mod internlm2;
mod llama;
mod mistral;
mod qwen2;

use serde::{Deserialize, Serialize};

use crate::names::NameTable;

/// Makes the enum, the list of all and the way to each family's file from one line for each.
macro_rules! registry {
    ($($(#[$doc:meta])* $name:ident => $file:ident,)+) => {
        /// Model family.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum Architecture { $($(#[$doc])* $name,)+ }

        impl Architecture {
            /// All that can be read, in the order in which messages list them.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// What it states about itself.
            pub(crate) const fn family(self) -> &'static Family {
                match self { $(Self::$name => &$file::FAMILY,)+ }
            }
        }
    };
}

registry! {
    /// Llama 2 and 3, SmolLM2.
    Llama => llama,
    /// Mistral 7B and Nemo: Llama with a sliding window.
    Mistral => mistral,
    /// Qwen1.5, Qwen2, Qwen2.5: bias on QKV.
    Qwen2 => qwen2,
    /// InternLM2, InternLM2.5: Llama with other names, and Q, K and V in one tensor.
    InternLm2 => internlm2,
}

/// What a family states about itself.
pub(crate) struct Family {
    /// Name of the class in a Hugging Face `config.json`.
    pub class_name: &'static str,
    /// `model_type` in a `config.json`, and `general.architecture` in a GGUF file.
    pub model_type: &'static str,
    /// Longest trained sequence where the config has no `max_position_embeddings`.
    pub max_position: usize,
    /// Bias on Q, K and V.
    pub qkv_bias: Switch,
    /// Whether queries see a window only.
    pub window: Window,
    /// Its own names for tensors, in Hugging Face files.
    pub names: &'static NameTable,
    /// How GGUF files have it; `None` where they have it as another family.
    pub gguf: Option<GgufRows>,
}

/// A property that a family has, or that its configuration switches.
pub(crate) enum Switch {
    /// Always on.
    On,
    /// As a field of the configuration says.
    Field {
        /// The field.
        name: &'static str,
        /// What its absence means.
        absent: bool,
    },
}

/// What the field `sliding_window` means.
pub(crate) enum Window {
    /// Nothing.
    Never,
    /// The length, if `use_sliding_window` is on.
    Switched {
        /// What the absence of the switch means.
        absent: bool,
    },
    /// The length; its absence means this one, and `null` none.
    Length {
        /// Positions back, the own one included.
        absent: usize,
    },
}

/// In which order GGUF files have the rows of Q and K.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum GgufRows {
    /// As Hugging Face.
    HuggingFace,
    /// The two rotary halves of a head alternate.
    Interleaved,
}

impl Architecture {
    /// Whether a GGUF file may say that it is of this family.
    pub(crate) const fn is_in_gguf(self) -> bool {
        self.family().gguf.is_some()
    }
}
