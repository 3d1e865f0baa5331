//! Sampling as flags, for the commands that generate.

use clap::Args;
use serde_json::{Map, Value};

/// How tokens are drawn. What is left out is the model's default.
#[derive(Debug, Clone, Default, Args)]
pub struct SamplingFlags {
    /// 0 always takes the likeliest token
    #[arg(long, value_name = "T")]
    temperature: Option<f64>,
    /// Keep the K likeliest tokens; 0 or -1: all
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    top_k: Option<i64>,
    /// Keep the likeliest tokens that together have this probability
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    /// Drop tokens less likely than this share of the likeliest one
    #[arg(long, value_name = "P")]
    min_p: Option<f64>,
    /// The same seed gives the same text
    #[arg(long, value_name = "N")]
    sampling_seed: Option<i64>,
    /// End an answer at this text; may be given up to four times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
}

impl SamplingFlags {
    /// The fields of a request.
    pub fn fields(&self) -> Map<String, Value> {
        let mut fields = Map::new();
        let mut add = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                fields.insert(name.to_owned(), value);
            }
        };
        add("temperature", self.temperature.map(Value::from));
        add("top_k", self.top_k.map(Value::from));
        add("top_p", self.top_p.map(Value::from));
        add("min_p", self.min_p.map(Value::from));
        add("seed", self.sampling_seed.map(Value::from));
        add("stop", (!self.stop.is_empty()).then(|| Value::from(self.stop.clone())));
        fields
    }
}
